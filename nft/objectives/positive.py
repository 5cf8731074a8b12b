"""DiffusionNFT without its negative branch, the ablation of arXiv 2509.16117."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nft_kernels import nft_loss

from .base import OBJECTIVES, Batch, Loss, Objective
from .nft import weights

if TYPE_CHECKING:
    from ..config import Config


def loss(batch: Batch, config: Config, verify: bool) -> Loss:
    """mean_i r_i (M l+_i / beta + kl_weight KL_i): what is left when (1 - r) l- is struck out."""
    v_old = batch.v_theta.detach() if batch.v_old is None else batch.v_old
    out = nft_loss(
        batch.v_theta,
        v_old,
        batch.x_t,
        batch.x0,
        batch.t,
        torch.ones_like(batch.weights),
        v_ref=batch.v_ref,
        beta=config.beta,
        adv_clip_max=config.adv_clip_max,
        kl_weight=config.kl_weight,
        weighting=config.weighting,
        sample_weight=batch.weights,
        reduction="sum",
    )
    return out._replace(loss=out.loss / len(batch.weights))


OBJECTIVES["positive"] = Objective(weights, loss, needs_old=True)
