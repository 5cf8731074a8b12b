"""The executable specification: every op in plain PyTorch, exact enough to judge the others in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """NaN for what is not within [0, 1]: where nobody has looked at a number, only the result can tell that it is
    wrong."""
    return torch.where((x >= 0) & (x <= 1), x, math.nan)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype every backend computes in: float64 if any tensor is float64, else float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32
