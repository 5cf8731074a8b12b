"""Group normalization (Wu and He, arXiv 1803.08494) and SiLU, which follow each other in diffusers' decoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compute_dtype


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(group_norm(x)) of pictures (B, C, H, W) with (C,) ``weight`` and ``bias``, in channels_last memory."""
    dtype = compute_dtype(x)
    normed = torch.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps)
    return F.silu(normed).to(x.dtype).contiguous(memory_format=torch.channels_last)
