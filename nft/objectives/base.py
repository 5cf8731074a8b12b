"""The interface of an objective, and the flow-matching loss that two of them share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ..config import Config


class Batch(NamedTuple):
    """One micro-batch: velocities and latents (B, C, H, W), times and weights (B,)."""

    v_theta: Tensor
    v_old: Tensor | None
    v_ref: Tensor | None
    x_t: Tensor
    x0: Tensor
    t: Tensor
    weights: Tensor


class Loss(Protocol):
    """A differentiable mean over the batch, and per sample (B,), detached, what is monitored."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def kl(self) -> Tensor: ...
    @property
    def old_deviation(self) -> Tensor: ...


class Objective(NamedTuple):
    """``weights`` turns the advantages (B,) of a whole epoch into one weight per picture; ``loss`` takes a batch of
    them, the settings, and whether to compare its kernels with the float64 reference."""

    weights: Callable[[Tensor, Config], Tensor]
    loss: Callable[[Batch, Config, bool], Loss]
    needs_old: bool
    """Whether the loss needs the old policy's velocity."""


OBJECTIVES: dict[str, Objective] = {}


class FlowMatching(NamedTuple):
    """Result of ``flow_matching``."""

    loss: Tensor
    kl: Tensor
    old_deviation: Tensor


def flow_matching(batch: Batch, config: Config, verify: bool) -> FlowMatching:
    """mean_i w_i mean_elements (v_theta - v)^2 + kl_weight mean_i mean_elements (v_theta - v_ref)^2.

    The target v = eps - x0 is (x_t - x0) / t, so the noise need not be kept.
    """
    v_theta = batch.v_theta.float()
    shape = (-1, *[1] * (v_theta.ndim - 1))
    target = (batch.x_t - batch.x0) / batch.t.view(shape)
    errors = (v_theta - target).square().flatten(1).mean(1)
    kl = errors.new_zeros(len(errors))
    if batch.v_ref is not None:
        kl = (v_theta - batch.v_ref.float()).square().flatten(1).mean(1)
    loss = (batch.weights * errors).mean() + config.kl_weight * kl.mean()
    return FlowMatching(loss, kl.detach(), kl.new_zeros(len(kl)))
