"""GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2, which torch computes in float32 for narrower x."""
    return F.gelu(x, approximate="tanh")
