"""RMS norm of every head of queries and keys, written to where the joint sequence wants them, and values with them."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import compute_dtype
from ._common import OPTIONS, compute, exact, next_power_of_2, number
from ._rows import load_row, row_of, rows, store_row, warps


@triton.jit
def _heads(heads, head_dim, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Elements of a row as (head, dimension), and which of them there are."""
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, DIM)[None, :]
    return head * head_dim + dim, (head < heads) & (dim < head_dim)


@triton.jit
def _inverse(x, head_dim, eps, dtype: tl.constexpr):
    return 1 / tl.sqrt(tl.sum(x * x, 1) / head_dim.to(dtype) + number(eps, dtype))[:, None]


@triton.jit
def _weight(weight, head_dim, dtype: tl.constexpr, DIM: tl.constexpr):
    dim = tl.arange(0, DIM)
    return tl.load(weight + dim, dim < head_dim, other=0).to(dtype)[None, :]


@triton.jit
def _qk_norm(
    inputs,
    weights,
    outputs,
    eps,
    length: tl.int32,
    heads: tl.int32,
    head_dim: tl.int32,
    dtype: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    sample, position = row_of(length)
    lane, inside = _heads(heads, head_dim, HEADS, DIM)
    for i in tl.static_range(len(inputs)):
        x = load_row(inputs[i], sample, position, lane, inside, dtype)
        if i < len(weights):
            x = x * _inverse(x, head_dim, eps, dtype) * _weight(weights[i], head_dim, dtype, DIM)
        store_row(outputs[i], sample, position, lane, inside, x)


@triton.jit
def _differentiate(
    inputs,
    weights,
    grads,
    outputs,
    eps,
    length: tl.int32,
    heads: tl.int32,
    head_dim: tl.int32,
    dtype: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    sample, position = row_of(length)
    lane, inside = _heads(heads, head_dim, HEADS, DIM)
    for i in tl.static_range(len(inputs)):
        x = load_row(inputs[i], sample, position, lane, inside, dtype)
        inverse = _inverse(x, head_dim, eps, dtype)
        normed = x * inverse
        grad = load_row(grads[i], sample, position, lane, inside, dtype) * _weight(weights[i], head_dim, dtype, DIM)
        mean = tl.sum(grad * normed, 1)[:, None] / head_dim.to(dtype)
        store_row(outputs[i], sample, position, lane, inside, inverse * (grad - normed * mean))


def _part(x: Tensor, start: int, length: int) -> Tensor:
    """Of a (B, S, H, d) tensor as (B, S, H d), with the heads one after another."""
    part = x[:, start : start + length]
    return (part if part.stride(2) == part.shape[3] else part.contiguous()).flatten(2)


def _launch(kernel, weights: Sequence[Tensor], eps: float, inputs: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    batch, length, heads, head_dim = inputs[0].shape
    blocks = next_power_of_2(heads), next_power_of_2(head_dim)
    dtype = compute(compute_dtype(*inputs, *weights, *others[0]))
    first, *rest = (tuple(map(rows, group)) for group in ([_part(x, 0, length) for x in inputs], *others))
    with torch.cuda.device_of(inputs[0]):
        kernel[(batch * length,)](
            first,
            tuple(weights),
            *rest,
            exact(eps),
            length,
            heads,
            head_dim,
            dtype,
            *blocks,
            num_warps=warps(blocks[0] * blocks[1]),
            **OPTIONS,
        )


def qk_norm(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], outputs: Sequence[Tensor], start: int, eps: float
) -> None:
    """Write each of the ``inputs`` (B, S, H, d), normalized with its weight (d,), into its output from position
    ``start`` on; unchanged those beyond the weights."""
    length = inputs[0].shape[1]
    _launch(_qk_norm, weights, eps, inputs, [_part(out, start, length) for out in outputs])


def qk_norm_gradient(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    start: int,
    eps: float,
) -> None:
    """Write the gradient of each of the ``inputs`` into its output, given those of what ``qk_norm`` wrote, in which
    they begin at position ``start``."""
    length = inputs[0].shape[1]
    parts = [_part(grad, start, length) for grad in grads]
    _launch(_differentiate, weights, eps, inputs, parts, [_part(out, 0, length) for out in outputs])
