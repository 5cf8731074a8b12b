"""The interface of an objective, and what several of them share: flow matching and the clipped ratio."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..config import Config


class Step(NamedTuple):
    """What a row of the rollout's solver did from x_t: x' = a x_t + b v + c z, where ``x`` (B, C, H, W) is x'."""

    x: Tensor
    a: Tensor
    """(B,) as are b and c."""
    b: Tensor
    c: Tensor


class Batch(NamedTuple):
    """One micro-batch: velocities and latents (B, C, H, W), times and weights (B,)."""

    v_theta: Tensor
    v_old: Tensor | None
    """None where the old policy is the trained one, or the objective does not need it."""
    v_ref: Tensor | None
    x_t: Tensor
    x0: Tensor
    t: Tensor
    weights: Tensor
    step: Step | None = None
    """For objectives that train on the rollout's own states."""


class Loss(Protocol):
    """A differentiable mean over the batch, and per sample (B,), detached, what is monitored."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def kl(self) -> Tensor: ...
    @property
    def old_deviation(self) -> Tensor: ...


class Objective(NamedTuple):
    """``weights`` turns the advantages (B,) of a whole epoch into one weight per picture, and ``loss`` takes a batch of
    them and the settings."""

    weights: Callable[[Tensor, Config], Tensor]
    loss: Callable[[Batch, Config], Loss]
    needs_old: bool
    """Whether the loss needs the old policy's velocity."""
    reads: tuple[str, ...] = ()
    """The settings that it reads and other objectives may not."""
    trajectory: bool = False
    """Whether it trains on the rollout's stochastic steps, and not on noise that is added to clean latents."""
    verify: Callable[[Batch, Config], object] | None = None
    """Compares its kernels with the float64 reference, and raises ``nft_kernels.check.KernelMismatchError``."""


OBJECTIVES: dict[str, Objective] = {}


def unread(name: str) -> set[str]:
    """The settings that other objectives read and this one does not."""
    return {key for each in OBJECTIVES.values() for key in each.reads} - {*OBJECTIVES[name].reads}


class Measured(NamedTuple):
    """A ``Loss`` in plain PyTorch."""

    loss: Tensor
    kl: Tensor
    old_deviation: Tensor


def per_sample(values: Tensor) -> Tensor:
    """Mean over a sample's elements, (B, ...) to (B,)."""
    return values.flatten(1).mean(1)


def like(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1) with x's number of dimensions."""
    return values.view(-1, *[1] * (x.ndim - 1))


def velocities(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """v_theta, v_old and v_ref in float32 or better. One that is not given is v_theta itself: a KL term is 0 then."""
    dtype = torch.promote_types(batch.v_theta.dtype, torch.float32)
    v_theta = batch.v_theta.to(dtype)
    old, ref = (v_theta.detach() if v is None else v.to(dtype) for v in (batch.v_old, batch.v_ref))
    return v_theta, old, ref


def flow_matching(batch: Batch, config: Config) -> Measured:
    """mean_i w_i mean_elements (v_theta - v)^2 + kl_weight mean_i mean_elements (v_theta - v_ref)^2.

    The target v = eps - x0 is (x_t - x0) / t, so the noise need not be kept.
    """
    v_theta, _, v_ref = velocities(batch)
    errors = per_sample((v_theta - (batch.x_t - batch.x0) / like(batch.t, v_theta)).square())
    kl = per_sample((v_theta - v_ref).square())
    loss = (batch.weights * errors).mean() + config.kl_weight * kl.mean()
    return Measured(loss, kl.detach(), torch.zeros_like(kl))


def clipped(log_ratio: Tensor, weights: Tensor, clip_range: float) -> Tensor:
    """Mean over (B,) of -min(w rho, w clip(rho, 1 - c, 1 + c)) with rho = e^log_ratio (PPO, arXiv 1707.06347)."""
    ratio = log_ratio.exp()
    return -torch.minimum(weights * ratio, weights * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
