"""Adaptive layer normalization (Peebles and Xie, arXiv 2212.09748, adaLN-Zero), with the residual before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compute_dtype


def layer_norm_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """h = x + gate y, rounded to x's dtype, and (1 + scale) LayerNorm(h) + shift for one or two modulations.

    ``x`` and ``y`` are (B, S, D), the others (B, D). Without ``y``, h is x itself.
    """
    dtype = compute_dtype(x, y, gate, scale, shift, scale2, shift2)

    def per_sample(modulation: Tensor) -> Tensor:
        return modulation.to(dtype)[:, None]

    h = x
    if y is not None and gate is not None:
        h = torch.addcmul(x.to(dtype), per_sample(gate), y.to(dtype)).to(x.dtype)
    normed = F.layer_norm(h.to(dtype), h.shape[-1:], eps=eps)
    results = [(1 + per_sample(scale)) * normed + per_sample(shift)]
    if scale2 is not None and shift2 is not None:
        results.append((1 + per_sample(scale2)) * normed + per_sample(shift2))
    return h, *(result.to(x.dtype) for result in results)
