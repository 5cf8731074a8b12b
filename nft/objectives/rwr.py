"""Reward-weighted regression (Peters and Schaal 2007; for flow models Fan et al., arXiv 2502.06061)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .base import OBJECTIVES, Objective, flow_matching

if TYPE_CHECKING:
    from ..config import Config


def weights(advantages: Tensor, config: Config) -> Tensor:
    """exp(A / rwr_temperature), divided by its mean over the epoch."""
    return (advantages.double() / config.rwr_temperature).softmax(0).to(advantages.dtype) * len(advantages)


OBJECTIVES["rwr"] = Objective(weights, flow_matching, needs_old=False, reads=("rwr_temperature",))
