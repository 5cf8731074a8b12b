"""Rows in float8 (e4m3 of Micikevicius et al., arXiv 2209.05433), each with a scale of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max


def quantize_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Rows (N, D) of x (..., D), or of its GELU in the tanh form, and what to multiply them with, (N, 1) float32."""
    wide = x.flatten(0, -2).float()
    if gelu:
        wide = F.gelu(wide, approximate="tanh")
    scale = (wide.abs().amax(1, keepdim=True) * (1 / LARGEST)).clamp_min(torch.finfo(torch.float32).tiny)
    # The largest may end a few last bits of float32 above LARGEST, to which float8 rounds it.
    return (wide * scale.reciprocal()).to(DTYPE, memory_format=torch.contiguous_format), scale
