"""``quantize_rows``: rows in float8 with a scale each, for torch's row-wise scaled products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import load
from ..reference import quantize_rows as reference
from . import _validate
from ._rows import backend_of, dense


def why_not(device: torch.device) -> str | None:
    """Why a device has no float8, or None when it has."""
    if device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
        return f"it needs an NVIDIA GPU of compute capability 8.9 or later, the tensors are on {device}"
    return None


def quantize_rows(x: Tensor, *, gelu: bool = False, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows of x in float8 (e4m3 of Micikevicius et al., arXiv 2209.05433), each scaled so that its largest becomes the
    largest of float8. Computed in float32, in one pass, and without a gradient.

    Args:
        x: (N, D) or (B, S, D), float32, bfloat16, float16 or float64; rows that are not dense are copied.
        gelu: quantize GELU(x) in the tanh form instead.
        backend: ``auto``, ``triton`` or ``reference``.

    Returns:
        (N, D) float8_e4m3fn with N = B S, dense, and (N, 1) float32, what to multiply the rows with. Where a row has a
        NaN or infinity, so has its scale.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: a GPU without float8, or an explicit backend that cannot run.
    """
    _validate.latents("x", x, "(N, D) or (B, S, D)", (2, 3))
    _validate.flag("gelu", gelu)
    if reason := why_not(x.device):
        raise RuntimeError(f"quantize_rows: cannot run: {reason}")
    x = x.detach()
    if backend_of("quantize_rows", backend, x, kernels=("triton",)) == "reference":
        return reference.quantize_rows(x, gelu)
    x = dense(x if x.ndim == 3 else x[None])
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    rows, scale = x.new_empty(count, width, dtype=reference.DTYPE), x.new_empty(count, 1, dtype=torch.float32)
    load("triton").quantize_rows(x, rows.view(x.shape), scale, gelu)
    return rows, scale
