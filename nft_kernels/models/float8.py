"""Matrix products in float8, with a scale for every row of a factor."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..ops.quantize_rows import quantize_rows
from ..ops.quantize_rows import why_not as no_float8


@functools.cache
def _no_product(device: torch.device) -> str | None:
    """Why torch has no row-wise product there, as older versions have not on a CPU and some GPUs; None when it has."""
    rows = torch.zeros(16, 16, dtype=torch.float8_e4m3fn, device=device)
    scale, dtype = torch.ones(16, 1, device=device), torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        torch._scaled_mm(rows, rows.t(), scale_a=scale, scale_b=scale.t(), out_dtype=dtype)
    except RuntimeError as error:
        return f"torch {torch.__version__} has none on {device} ({str(error).splitlines()[0]})"
    return None


def why_not(x: Tensor) -> str | None:
    """Why torch's row-wise product cannot take x, or None when it can."""
    if reason := no_float8(x.device) or _no_product(x.device):
        return reason
    return None if x.is_cpu or x.dtype == torch.bfloat16 else f"on a GPU it takes bfloat16, not {x.dtype}"


def linear(
    x: Tensor, weight: tuple[Tensor, Tensor], bias: Tensor | None, *, gelu: bool = False, backend: str = "auto"
) -> Tensor:
    """x (..., K), or its GELU, times the transpose of a quantized weight (N, K), in x's dtype.

    On a GPU sums stay in the matrix units, which have fewer bits for them than float32: on Hopper that is much faster.
    """
    rows, scale = quantize_rows(x, gelu=gelu, backend=backend)
    out = torch._scaled_mm(
        rows,
        weight[0].t(),
        scale_a=scale,
        scale_b=weight[1].t(),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=x.is_cuda,
    )
    return out.view(*x.shape[:-1], -1)
