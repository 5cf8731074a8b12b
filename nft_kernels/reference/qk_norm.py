"""RMS norm of queries and keys (Zhang and Sennrich, arXiv 1910.07467) of two streams joined into one sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    dtype = compute_dtype(x, weight)
    wide = x.to(dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)).to(x.dtype)


def qk_norm(
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
) -> tuple[Tensor, ...]:
    """Queries and keys (B, S + S', H, d) of streams (B, S, H, d) and (B, S', H, d), each with its own weights (d,), and
    if given the values of both, unchanged."""
    q, k = rms_norm(q, weight_q, eps), rms_norm(k, weight_k, eps)
    if context_q is not None and context_k is not None:
        assert context_weight_q is not None and context_weight_k is not None
        q = torch.cat([q, rms_norm(context_q, context_weight_q, eps).to(q.dtype)], 1)
        k = torch.cat([k, rms_norm(context_k, context_weight_k, eps).to(k.dtype)], 1)
    return (q, k) if v is None or context_v is None else (q, k, torch.cat([v, context_v], 1))
