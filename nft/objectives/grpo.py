"""GRPO on the rollout's stochastic steps: Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818), MixGRPO (2507.21802).

They differ in the settings only: the solver, its window, and whether there is a KL term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import OBJECTIVES, Batch, Measured, Objective, clipped, like, per_sample, velocities

if TYPE_CHECKING:
    from ..config import Config


def weights(advantages: Tensor, config: Config) -> Tensor:
    """Advantages within [-adv_clip_max, adv_clip_max]."""
    return advantages.clamp(-config.adv_clip_max, config.adv_clip_max)


def loss(batch: Batch, config: Config) -> Measured:
    """Clipped ratio of the densities of x' under N(a x + b v, c^2), and kl_weight KL to the reference's step.

    The log-density is the mean over elements, as in Flow-GRPO, and so is the KL, b^2 (v_theta - v_ref)^2 / (2 c^2).
    With the step's error e = x' - a x - b v_old and d = b (v_theta - v_old) the log-ratio is d (2 e - d) / (2 c^2),
    which has no cancellation where the policies are close.
    """
    assert batch.step is not None
    v_theta, v_old, v_ref = velocities(batch)
    a, b, c = (like(value, v_theta) for value in batch.step[1:])
    moved = b * (v_theta - v_old)
    error = batch.step.x - a * batch.x_t - b * v_old
    log_ratio = per_sample(moved * (2 * error - moved) / (2 * c.square()))
    kl = per_sample((b * (v_theta - v_ref) / c).square() / 2)
    value = clipped(log_ratio, batch.weights, config.clip_range) + config.kl_weight * kl.mean()
    return Measured(value, kl.detach(), per_sample((v_theta - v_old).detach().abs()))


OBJECTIVES["grpo"] = Objective(weights, loss, needs_old=True, reads=("adv_clip_max", "clip_range"), trajectory=True)
