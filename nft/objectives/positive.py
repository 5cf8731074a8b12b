"""DiffusionNFT without its negative branch, the ablation of arXiv 2509.16117."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nft_kernels import nft_loss

from .base import OBJECTIVES, Batch, Loss, Objective
from .nft import READS, arguments, weights

if TYPE_CHECKING:
    from ..config import Config


def loss(batch: Batch, config: Config, verify: bool) -> Loss:
    """mean_i r_i (M l+_i / beta + kl_weight KL_i): what is left when (1 - r) l- is struck out."""
    tensors, options = arguments(batch, config)
    r = torch.ones_like(batch.weights)
    out = nft_loss(*tensors, r, **options, sample_weight=batch.weights, reduction="sum")
    return out._replace(loss=out.loss / len(batch.weights))


OBJECTIVES["positive"] = Objective(weights, loss, needs_old=True, reads=READS)
