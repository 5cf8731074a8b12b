"""``attention``: softmax(q k^T / sqrt(d)) v of short sequences, by a kernel for the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import native
from ..backends._memory import new_empty
from ..reference import attention as reference
from . import _validate
from ._rows import backend_of, dense, fused


def why_not(q: Tensor) -> str | None:
    """Why the kernel cannot take queries, keys and values like ``q``, or None when it can."""
    if not q.is_cpu:
        return f"it has a kernel for tensors on the CPU, not on {q.device}"
    if q.dtype != torch.float32:
        return f"it takes float32, not {q.dtype}"
    return backends.why_not("native", q)


def _run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = new_empty(q, q.shape)
    native.attention(dense(q), dense(k), dense(v), out)
    return out


def _fake(q, k, v):
    return q.new_empty(q.shape)


def _gradient(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads = new_empty(q, q.shape), new_empty(q, q.shape), new_empty(q, q.shape)
    native.attention_gradient(dense(q), dense(k), dense(v), dense(grad), *grads)
    return grads


def _fake_gradient(q, k, v, grad):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Any, grads: tuple[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return gradient(*ctx.saved_tensors, *grads)


_call = fused("attention", _run, _fake, _gradient, _fake_gradient, _setup_context, _backward)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention without a mask, softmax(q k^T / sqrt(d)) v (Vaswani et al., arXiv 1706.03762).

    The kernel is made for sequences whose scores stay in a cache. It keeps nothing for the backward but its inputs, and
    a sample's result depends neither on the batch it is in nor on the number of threads.

    Args:
        q, k, v: (B, S, H, d) of one dtype: float32, or for the reference also bfloat16, float16 or float64. Heads that
            are not dense in memory are copied.
        backend: ``auto``, ``native`` or ``reference``.

    Returns:
        (B, S, H, d), dense in memory.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("q", q, "(B, S, H, d)", (4,))
    for name, x in (("k", k), ("v", v)):
        _validate.tensor_like(name, x, q, "q")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got {x.dtype}, accepted is the dtype of q, {q.dtype}")
    if backend_of("attention", backend, q, kernels=("native",), native_dtype=torch.float32) == "reference":
        return reference.attention(q, k, v)
    return _call(q, k, v)
