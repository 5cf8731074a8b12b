"""DiffusionNFT without its negative branch, the ablation of arXiv 2509.16117."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nft_kernels import nft_loss
from nft_kernels.check import compare_nft_loss

from .base import OBJECTIVES, Batch, Loss, Objective
from .nft import READS, arguments, weights

if TYPE_CHECKING:
    from ..config import Config


def _arguments(batch: Batch, config: Config) -> tuple[list[Tensor], dict[str, Any]]:
    (*tensors, r), options = arguments(batch, config)
    return [*tensors, torch.ones_like(r)], {**options, "sample_weight": r, "reduction": "sum"}


def loss(batch: Batch, config: Config) -> Loss:
    """mean_i r_i (M l+_i / beta + kl_weight KL_i): what is left when (1 - r) l- is struck out."""
    tensors, options = _arguments(batch, config)
    out = nft_loss(*tensors, **options)
    return out._replace(loss=out.loss / len(batch.weights))


def verify(batch: Batch, config: Config) -> None:
    """The same by kernels and by the reference."""
    tensors, options = _arguments(batch, config)
    compare_nft_loss(*tensors, **options)


OBJECTIVES["positive"] = Objective(weights, loss, needs_old=True, reads=READS, verify=verify)
