"""Gated residuals, layer normalization and one or two modulations in one pass over each row."""

from typing import Any

import torch
import triton
import triton.language as tl

from ...reference import compute_dtype
from ._common import OPTIONS, compute, exact, next_power_of_2, number, rounded
from ._rows import load_row, row_of, rows, store_row, warps


@triton.jit
def _normalize(value, inside, width, eps, dtype: tl.constexpr):
    count = width.to(dtype)
    centred = tl.where(inside, value - tl.sum(value, 0) / count, 0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / count + number(eps, dtype))
    return centred * scale, scale


@triton.jit
def _modulate(normed, scale, shift, out, sample, position, lane, inside, dtype: tl.constexpr):
    factor = 1 + load_row(scale, sample, 0, lane, inside, dtype)
    value = factor * normed + load_row(shift, sample, 0, lane, inside, dtype)
    store_row(out, sample, position, lane, inside, value)


@triton.jit
def _layer_norm_modulate(
    x,
    y,
    y2,
    y_bias,
    gate,
    gate2,
    scale,
    shift,
    scale2,
    shift2,
    h,
    out,
    out2,
    eps,
    length: tl.int32,
    width: tl.int32,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, position = row_of(length)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    value = load_row(x, sample, position, lane, inside, dtype)
    if y is not None:
        residual = load_row(y, sample, position, lane, inside, dtype)
        if y_bias is not None:
            residual += load_row(y_bias, sample, 0, lane, inside, dtype)
        value += load_row(gate, sample, 0, lane, inside, dtype) * residual
        if y2 is not None:
            opened2 = load_row(gate2, sample, 0, lane, inside, dtype)
            value += opened2 * load_row(y2, sample, position, lane, inside, dtype)
        # What is normalized is what the backward will find in memory.
        value = rounded(value, h.data.dtype.element_ty).to(dtype)
        store_row(h, sample, position, lane, inside, value)
    normed, _ = _normalize(value, inside, width, eps, dtype)
    _modulate(normed, scale, shift, out, sample, position, lane, inside, dtype)
    if out2 is not None:
        _modulate(normed, scale2, shift2, out2, sample, position, lane, inside, dtype)


@triton.jit
def _differentiate(
    h,
    gate,
    gate2,
    scale,
    scale2,
    grad_h,
    grad_out,
    grad_out2,
    grad_x,
    grad_y,
    grad_y2,
    eps,
    length: tl.int32,
    width: tl.int32,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, position = row_of(length)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    normed, inverse = _normalize(load_row(h, sample, position, lane, inside, dtype), inside, width, eps, dtype)
    grad = tl.zeros((BLOCK,), dtype)
    if grad_out is not None:
        factor = 1 + load_row(scale, sample, 0, lane, inside, dtype)
        grad += factor * load_row(grad_out, sample, position, lane, inside, dtype)
    if grad_out2 is not None:
        factor2 = 1 + load_row(scale2, sample, 0, lane, inside, dtype)
        grad += factor2 * load_row(grad_out2, sample, position, lane, inside, dtype)
    count = width.to(dtype)
    grad = inverse * (grad - tl.sum(grad, 0) / count - normed * (tl.sum(grad * normed, 0) / count))
    if grad_h is not None:
        grad += load_row(grad_h, sample, position, lane, inside, dtype)
    store_row(grad_x, sample, position, lane, inside, grad)
    if grad_y is not None:
        opened = load_row(gate, sample, 0, lane, inside, dtype)
        store_row(grad_y, sample, position, lane, inside, opened * grad)
    if grad_y2 is not None:
        opened2 = load_row(gate2, sample, 0, lane, inside, dtype)
        store_row(grad_y2, sample, position, lane, inside, opened2 * grad)


def _launch(kernel, *args: Any) -> None:
    *tensors, eps = args
    batch, length, width = tensors[0].shape
    block = next_power_of_2(width)
    dtype = compute(compute_dtype(*tensors))
    with torch.cuda.device_of(tensors[0]):
        kernel[(batch * length,)](
            *map(rows, tensors), exact(eps), length, width, dtype, block, num_warps=warps(block), **OPTIONS
        )


def layer_norm_modulate(*args: Any) -> None:
    """``args`` are the tensors from x on, at last h, out and out2, and eps. Writes the last three, but those that are
    empty. Rows are dense."""
    _launch(_layer_norm_modulate, *args)


def layer_norm_modulate_gradient(*args: Any) -> None:
    """``args`` are the tensors from h on, at last the gradients of x, y and y2, and eps. Writes the last three, but
    those that are empty. Rows are dense."""
    _launch(_differentiate, *args)
