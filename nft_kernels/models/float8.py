"""Matrix products in float8 (e4m3 of Micikevicius et al., arXiv 2209.05433), with a scale for every row of a factor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(DTYPE).max


@functools.cache
def _on_cpu() -> str | None:
    """Why torch has no row-wise product on the CPU, as older versions have not; None when it has."""
    rows, scale = torch.zeros(16, 16, dtype=DTYPE), torch.ones(16, 1)
    try:
        torch._scaled_mm(rows, rows.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except RuntimeError as error:
        return f"torch {torch.__version__} has none on the CPU ({str(error).splitlines()[0]})"
    return None


def why_not(x: Tensor) -> str | None:
    """Why torch's row-wise product cannot take x, or None when it can."""
    if x.device.type == "cpu":
        return _on_cpu()
    if x.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(x.device) < (8, 9):
        return f"it needs an NVIDIA GPU of compute capability 8.9 or later, the tensors are on {x.device}"
    return None if x.dtype == torch.bfloat16 else f"on a GPU it takes bfloat16, not {x.dtype}"


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x (N, D) in float8, and what to multiply them with, (N, 1) float32."""
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scale).clamp(-_LARGEST, _LARGEST).to(DTYPE), scale


def linear(x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """x (..., K) times the transpose of a quantized weight (N, K), in x's dtype."""
    rows, scale = quantize(x.flatten(0, -2))
    out = torch._scaled_mm(rows, weight[0].t(), scale_a=scale, scale_b=weight[1].t(), bias=bias, out_dtype=x.dtype)
    return out.view(*x.shape[:-1], -1)
