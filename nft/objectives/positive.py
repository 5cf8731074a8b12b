"""DiffusionNFT without its negative branch, the ablation of arXiv 2509.16117."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nft_kernels import nft_loss
from nft_kernels.check import compare_nft_loss

from .base import OBJECTIVES, Batch, Loss, Objective
from .nft import READS, arguments, weights

if TYPE_CHECKING:
    from ..config import Config


def _arguments(batch: Batch, config: Config) -> dict[str, Any]:
    r = batch.weights
    return {**arguments(batch, config), "r": torch.ones_like(r), "sample_weight": r, "reduction": "sum"}


def loss(batch: Batch, config: Config) -> Loss:
    """mean_i r_i (M l+_i / beta + kl_weight KL_i): what is left when (1 - r) l- is struck out."""
    out = nft_loss(**_arguments(batch, config))
    return out._replace(loss=out.loss / len(batch.weights))


def verify(batch: Batch, config: Config) -> None:
    """The same by kernels and by the reference."""
    compare_nft_loss(**_arguments(batch, config))


OBJECTIVES["positive"] = Objective(weights, loss, needs_old=True, reads=READS, verify=verify)
