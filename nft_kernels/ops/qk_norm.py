"""``qk_norm``: queries and keys of one or two streams, normalized and written into one sequence, and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import load
from ..backends._memory import new_empty
from ..reference import compute_dtype
from ..reference import qk_norm as reference
from . import _validate
from ._rows import backend_of, dense, fused


def _run(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_weight_q: Tensor | None,
    context_weight_k: Tensor | None,
    v: Tensor | None,
    context_v: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, which may be empty."""
    outputs = _fake(q, k, weight_q, weight_k, context_q, context_k, context_weight_q, context_weight_k, v)
    joint = outputs if v is not None else outputs[:2]
    kernel = load(backend).qk_norm

    def write(start: int, weights: Sequence[Tensor | None], *streams: Tensor | None) -> None:
        kernel([dense(x) for x in streams if x is not None], [dense(weight) for weight in weights], joint, start, eps)

    write(0, (weight_q, weight_k), q, k, v)
    if context_q is not None:
        write(q.shape[1], (context_weight_q, context_weight_k), context_q, context_k, context_v)
    return outputs


def _fake(q, k, weight_q, weight_k, context_q, context_k, context_weight_q, context_weight_k, v, *_):
    batch, length, heads, dim = q.shape
    shape = (batch, length + (0 if context_q is None else context_q.shape[1]), heads, dim)
    return new_empty(q, shape), new_empty(k, shape), q.new_empty(0) if v is None else new_empty(v, shape)


def _gradient(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    start: int,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of the queries and keys of a stream, which begins at ``start`` in the joint one."""
    outputs = _fake_gradient(q, k)
    inputs, weights, grads = (tuple(map(dense, pair)) for pair in ((q, k), (weight_q, weight_k), (grad_q, grad_k)))
    load(backend).qk_norm_gradient(inputs, weights, grads, outputs, start, eps)
    return outputs


def _fake_gradient(q, k, *_):
    return new_empty(q, q.shape), new_empty(k, k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, v, _, ctx.eps, ctx.backend = inputs
    ctx.joins_values = v is not None
    ctx.save_for_backward(*tensors)


def _weight_gradient(x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(x, weight)
    return (grad.to(dtype) * reference.rms_norm(x.to(dtype), torch.ones_like(weight), eps)).sum((0, 1, 2))


def _backward(ctx: Any, gradient: Any, grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    results: list[Tensor | None] = []
    length = saved[0].shape[1]
    for first, part in ((0, slice(0, length)), (4, slice(length, None))):
        q, k, *weights = saved[first : first + 4]
        if q is None:
            results += [None] * 4
            continue
        results += gradient(q, k, *weights, *grads[:2], part.start, ctx.eps, ctx.backend)
        # Training of adapters leaves the weights frozen, so plain PyTorch will do.
        for x, weight, grad, i in zip((q, k), weights, grads[:2], (2, 3), strict=True):
            wanted = ctx.needs_input_grad[first + i]
            results.append(_weight_gradient(x, weight, grad[:, part], ctx.eps) if wanted else None)
    values = (grads[2][:, :length], grads[2][:, length:]) if ctx.joins_values else (None, None)
    return (*results, *values, None, None)


_call = fused("qk_norm", _run, _fake, _gradient, _fake_gradient, _setup_context, _backward)


def unchecked(q, k, weight_q, weight_k, *context, v=None, context_v=None, eps, backend):
    """``qk_norm`` of arguments that fit, by a backend that can run."""
    args = (q, k, weight_q, weight_k, *(context or (None,) * 4), v, context_v, eps)
    if backend == "reference":
        return reference.qk_norm(*args)
    normed_q, normed_k, values = _call(*args, backend)
    return (normed_q, normed_k) if v is None else (normed_q, normed_k, values)


def qk_norm(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_weight_q: Tensor | None = None,
    context_weight_k: Tensor | None = None,
    *,
    v: Tensor | None = None,
    context_v: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """RMS norm of queries and keys over each head (Zhang and Sennrich, arXiv 1910.07467), written straight into the
    joint sequence of a stream and its context, as the joint attention of Esser et al. (arXiv 2403.03206) takes it.

    Computed in float32, or in float64 if any tensor is. Tensors whose last dimension is not dense are copied.

    Args:
        q, k: (B, S, H, d), float32, bfloat16, float16 or float64.
        weight_q, weight_k: (d,).
        context_q, context_k: (B, S', H, d), appended to the sequence.
        context_weight_q, context_weight_k: (d,). All four of the context or none.
        v, context_v: (B, S, H, d) and (B, S', H, d) of one dtype, joined unchanged by the same kernel. Both or neither.
        eps: added to the mean square.
        backend: ``auto``, ``native`` (on the CPU), ``triton`` or ``reference``.

    Returns:
        Queries and keys, (B, S + S', H, d), of the dtype of ``q`` and ``k``, and the values if there are any.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("q", q, "(B, S, H, d)", (4,))
    _validate.tensor_like("k", k, q, "q")
    context = context_q, context_k, context_weight_q, context_weight_k
    given = sum(x is not None for x in context)
    if given not in (0, 4):
        raise ValueError(f"context_q, context_k and their weights: got {given} of the 4, accepted are all or none")
    if context_q is not None and context_k is not None:
        _validate.latents("context_q", context_q)
        shape = (q.shape[0], *context_q.shape[1:2], *q.shape[2:])
        _validate.shaped("context_q", context_q, shape, "(B, S', H, d)", q, "q")
        _validate.tensor_like("context_k", context_k, context_q, "context_q")
    if (v is None) != (context_v is None) or (v is not None and context_q is None):
        raise ValueError("v, context_v: got one of them or no context, accepted are both with a context or neither")
    if v is not None and context_v is not None and context_q is not None:
        _validate.tensor_like("v", v, q, "q")
        _validate.tensor_like("context_v", context_v, context_q, "context_q")
        if v.dtype != context_v.dtype:
            raise TypeError(f"context_v: got {context_v.dtype}, accepted is the dtype of v, {v.dtype}")
    names = "weight_q", "weight_k", "context_weight_q", "context_weight_k"
    for name, weight in zip(names, (weight_q, weight_k, *context[2:]), strict=True):
        if weight is not None or not name.startswith("context"):
            _validate.shaped(name, weight, q.shape[-1:], "(d,)", q, "q")
    _validate.number("eps", eps, positive=True)
    chosen = backend_of("qk_norm", backend, q)
    return unchecked(q, k, weight_q, weight_k, *context, v=v, context_v=context_v, eps=float(eps), backend=chosen)
