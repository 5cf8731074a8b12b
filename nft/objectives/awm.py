"""GRPO with the flow-matching loss in the place of the log-likelihood: AWM (arXiv 2509.25050), V-GRPO (2604.23380)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from nft_kernels.reference.nft_loss import time_weighting

from .base import OBJECTIVES, Batch, Measured, Objective, clipped, like, per_sample, velocities

if TYPE_CHECKING:
    from ..config import Config


def weights(advantages: Tensor, config: Config) -> Tensor:
    """Advantages clipped to [-M, M] and divided by M = adv_clip_max, as AWM's code does."""
    return advantages.clamp(-config.adv_clip_max, config.adv_clip_max) / config.adv_clip_max


def loss(batch: Batch, config: Config) -> Measured:
    """Clipped ratio e^(L_old - L_theta) with L = s mean (v_theta - v)^2, and kl_weight mean (v_theta - v_ref)^2.

    ``weighting`` is s, 1 for ``none``, or for ``adaptive`` the old policy's own 1 / L, so that no time outweighs
    another.
    While the policies are equal the gradient is that of the flow-matching loss weighed by the advantage.
    """
    v_theta, v_old, v_ref = velocities(batch)
    target = (batch.x_t - batch.x0) / like(batch.t, v_theta)
    moved = v_theta - v_old
    # L_old - L_theta before it is scaled, without cancellation where the policies are close.
    gain = per_sample(moved * (2 * (target - v_old) - moved))
    scale = time_weighting(batch.t, config.weighting)
    if config.weighting == "adaptive":
        scale = 1 / per_sample((v_old - target).square()).clamp_min(1e-5)
    kl = per_sample((v_theta - v_ref).square())
    value = clipped(scale * gain, batch.weights, config.clip_range) + config.kl_weight * kl.mean()
    return Measured(value, kl.detach(), per_sample(moved.detach().abs()))


OBJECTIVES["awm"] = Objective(weights, loss, needs_old=True, reads=("adv_clip_max", "weighting", "clip_range"))
