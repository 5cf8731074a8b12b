"""Adaptive layer normalization (Peebles and Xie, arXiv 2212.09748, adaLN-Zero), with the residuals before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compute_dtype


def layer_norm_modulate(
    x: Tensor,
    y: Tensor | None,
    y2: Tensor | None,
    y_bias: Tensor | None,
    gate: Tensor | None,
    gate2: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """h = x + gate (y + y_bias) + gate2 y2, rounded to x's dtype, and (1 + scale) LayerNorm(h) + shift for one or two
    modulations.

    ``x``, ``y`` and ``y2`` are (B, S, D), ``y_bias`` (D,), the others (B, D). Without ``y``, h is x itself.
    """
    dtype = compute_dtype(x, y, y2, y_bias, gate, gate2, scale, shift, scale2, shift2)

    def per_sample(modulation: Tensor) -> Tensor:
        return modulation.to(dtype)[:, None]

    h = x
    if y is not None and gate is not None:
        residual = y.to(dtype) if y_bias is None else y.to(dtype) + y_bias.to(dtype)
        h = torch.addcmul(x.to(dtype), per_sample(gate), residual)
        if y2 is not None and gate2 is not None:
            h = torch.addcmul(h, per_sample(gate2), y2.to(dtype))
        h = h.to(x.dtype)
    normed = F.layer_norm(h.to(dtype), h.shape[-1:], eps=eps)
    results = [(1 + per_sample(scale)) * normed + per_sample(shift)]
    if scale2 is not None and shift2 is not None:
        results.append((1 + per_sample(scale2)) * normed + per_sample(shift2))
    return h, *(result.to(x.dtype) for result in results)
