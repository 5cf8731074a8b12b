"""DiffusionNFT (arXiv 2509.16117): contrast an implicit positive and negative policy by the optimality probability."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from nft_kernels import nft_loss, optimality_probability
from nft_kernels.check import compare_nft_loss

from .base import OBJECTIVES, Batch, Loss, Objective

if TYPE_CHECKING:
    from ..config import Config


def weights(advantages: Tensor, config: Config) -> Tensor:
    """r in [0, 1]."""
    return optimality_probability(advantages, adv_clip_max=config.adv_clip_max, mode=config.advantage_mode)


def arguments(batch: Batch, config: Config) -> dict[str, Any]:
    """What ``nft_loss`` takes. Where the old policy is the trained one, its velocity is v_theta itself."""
    return {
        "v_theta": batch.v_theta,
        "v_old": batch.v_theta.detach() if batch.v_old is None else batch.v_old,
        "x_t": batch.x_t,
        "x0": batch.x0,
        "t": batch.t,
        "r": batch.weights,
        "v_ref": batch.v_ref,
        "beta": config.beta,
        "adv_clip_max": config.adv_clip_max,
        "kl_weight": config.kl_weight,
        "weighting": config.weighting,
    }


def loss(batch: Batch, config: Config) -> Loss:
    """``nft_kernels.nft_loss``."""
    return nft_loss(**arguments(batch, config))


def verify(batch: Batch, config: Config) -> None:
    """The same by kernels and by the reference."""
    compare_nft_loss(**arguments(batch, config))


READS = ("beta", "adv_clip_max", "weighting", "advantage_mode")
OBJECTIVES["nft"] = Objective(weights, loss, needs_old=True, reads=READS, verify=verify)
