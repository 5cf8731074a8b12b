"""The DiffusionNFT loss in plain PyTorch (arXiv 2509.16117, section 3).

v+ = (1-beta) v_old + beta v_theta, v- = (1+beta) v_old - beta v_theta, and the errors of the x0 prediction are
e+- = x_t - t v+- - x0. The weight w+- is detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype

MIN_WEIGHT = 1e-5
WEIGHTINGS = ("adaptive", "none", "t", "t2")


def time_weighting(t: Tensor, weighting: str) -> Tensor:
    """Per-sample factor of mean(e^2): t for ``t``, t^2 for ``t2``, otherwise 1."""
    return {"t": t, "t2": t * t}.get(weighting, torch.ones_like(t))


def nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    v_ref: Tensor | None,
    beta: Tensor,
    adv_clip_max: float,
    kl_weight: float,
    weighting: str,
) -> tuple[Tensor, ...]:
    """The scalar loss and eight per-sample values, in the order of ``NFTLossOutput``.

    Computes in float64 if any tensor is float64, else in float32. ``t``, ``r``, ``beta`` have shape (B,).
    """
    dtype = compute_dtype(v_theta, v_old, x_t, x0, v_ref)
    v_theta, v_old, x_t, x0 = (x.to(dtype) for x in (v_theta, v_old, x_t, x0))
    v_old, x_t, x0 = v_old.detach(), x_t.detach(), x0.detach()
    t, r, beta = (x.detach().to(dtype) for x in (t, r, beta))

    def per_element(x: Tensor) -> Tensor:
        return x.view(-1, *[1] * (x0.ndim - 1))

    def mean(x: Tensor) -> Tensor:
        return x.flatten(1).mean(1) if x.ndim > 1 else x

    t_, beta_ = per_element(t), per_element(beta)

    def branch(velocity: Tensor) -> tuple[Tensor, Tensor]:
        error = x_t - t_ * velocity - x0
        if weighting == "adaptive":
            weight = mean(error.detach().abs()).clamp_min(MIN_WEIGHT)
        else:
            weight = torch.ones_like(t)
        return time_weighting(t, weighting) * mean(error.square()) / weight, weight

    positive_loss, positive_weight = branch((1 - beta_) * v_old + beta_ * v_theta)
    negative_loss, negative_weight = branch((1 + beta_) * v_old - beta_ * v_theta)
    policy_loss = adv_clip_max * (r * positive_loss + (1 - r) * negative_loss) / beta
    loss = policy_loss.mean()
    kl = torch.zeros_like(t)
    if v_ref is not None:
        kl = mean((v_theta - v_ref.detach().to(dtype)).square())
        loss = loss + kl_weight * kl.mean()
    deviation = (v_theta - v_old).detach().abs()
    largest = deviation.flatten(1).amax(1) if deviation.ndim > 1 else deviation
    details = (
        policy_loss,
        positive_loss,
        negative_loss,
        positive_weight,
        negative_weight,
        kl,
        mean(deviation),
        largest,
    )
    return (loss, *(x.detach() for x in details))
