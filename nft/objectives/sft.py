"""Supervised fine-tuning on the policy's own better half, the rejection-sampling baseline (RAFT, arXiv 2304.06767)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import OBJECTIVES, Objective, flow_matching

if TYPE_CHECKING:
    from ..config import Config


def weights(advantages: Tensor, config: Config) -> Tensor:
    """Equal for every picture that scores above the mean of its prompt's group, 0 for the others, 1 in the mean.

    An epoch in which no picture stands out in its group trains on nothing.
    """
    chosen = (advantages > 0).to(advantages.dtype)
    return chosen / chosen.mean().clamp_min(1 / len(chosen))


OBJECTIVES["sft"] = Objective(weights, flow_matching, needs_old=False)
