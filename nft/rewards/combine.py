"""Several rewards as one: from scores per reward to advantages and optimality probabilities, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nft_kernels import group_advantages, optimality_probability

METHODS = ("sum", "normalized_sum", "gdpo", "per_reward")
Rewards = Mapping[str, Tensor]
Weights = Mapping[str, float]


class Combined(NamedTuple):
    """``r`` and ``advantages`` (B,), and ``metrics`` with every reward's mean and deviation."""

    r: Tensor
    advantages: Tensor
    metrics: dict[str, float]


def _validate(rewards: Rewards, weights: Weights, group_ids: Tensor, std: str) -> None:
    if not rewards:
        raise ValueError("rewards: got none, accepted is at least one")
    if set(weights) != set(rewards):
        raise ValueError(f"weights: got {sorted(weights)}, accepted is one for each of {sorted(rewards)}")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weights: got {weight} for {name}, accepted are finite numbers of at least 0")
    if not any(weights.values()):
        raise ValueError("weights: got 0 for all rewards, accepted is at least one above 0")
    for name, values in rewards.items():
        if not values.is_floating_point():
            raise TypeError(f"rewards: got {values.dtype} for {name}, accepted are floating-point tensors")
        # Shapes that differ would broadcast.
        if values.shape != group_ids.shape:
            shapes = f"got shape {tuple(values.shape)} for {name}, accepted is {tuple(group_ids.shape)}"
            raise ValueError(f"rewards: {shapes}, that of group_ids")
    if std not in ("global", "group"):
        raise ValueError(f"std: got {std!r}, accepted are 'global' and 'group'")


def weighted_sum(rewards: Rewards, weights: Weights) -> Tensor:
    """sum_k w_k R_k, (B,)."""
    return sum((weights[name] * values for name, values in rewards.items()), torch.zeros(()))


def _normalized(values: Tensor) -> Tensor:
    x = values.double()
    deviation = x.std(correction=0)
    # What float32 can hardly tell apart is rounding.
    if deviation <= 1e-6 * x.abs().max():
        return torch.zeros_like(values)
    return ((x - x.mean()) / deviation).to(values.dtype)


def normalized_sum(rewards: Rewards, weights: Weights) -> Tensor:
    """sum_k w_k (R_k - mean) / std over all pictures, with the biased deviation: a reward's weight no longer depends on
    its unit. One that is the same for all pictures adds 0."""
    return weighted_sum({name: _normalized(values) for name, values in rewards.items()}, weights)


def combine(
    rewards: Rewards,
    weights: Weights,
    group_ids: Tensor,
    *,
    method: str = "sum",
    std: str = "global",
    adv_clip_max: float = 5.0,
    mode: str = "continuous",
) -> Combined:
    """Optimality probabilities of pictures with several rewards.

    Args:
        rewards: scores (B,) floating point by reward.
        weights: a finite number of at least 0 for every reward; one of weight 0 is only reported, and one at least is
            above 0.
        group_ids: (B,) integers; equal ids are pictures of one prompt.
        method: ``sum`` takes advantages of the weighted sum; ``normalized_sum`` first brings every reward to mean 0
            and deviation 1 over all pictures; ``gdpo`` sums advantages that were taken for each reward with its
            group's deviation (GDPO, arXiv 2601.05242, without its last normalisation over the batch);
            ``per_reward`` takes r for each reward and averages them by weight.
        std: ``global`` or ``group``, the deviation that advantages are divided by (biased); ``gdpo`` always takes
            the group's.
        adv_clip_max, mode: see ``nft_kernels.optimality_probability``; advantages are clipped to +-``adv_clip_max``.

    Returns:
        r, the advantages before clipping (for ``per_reward`` the weighted mean of the rewards' advantages), and for
        each reward ``reward_NAME``, its mean, and ``reward_NAME_std``, its biased deviation.

    Raises:
        ValueError, TypeError: an unknown method, weights or rewards that do not match or cannot be used, or what
            ``group_advantages`` refuses.
    """
    _validate(rewards, weights, group_ids, std)
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, accepted are {', '.join(METHODS)}")
    probability = partial(optimality_probability, adv_clip_max=adv_clip_max, mode=mode)
    counted = {name: values for name, values in rewards.items() if weights[name]}
    if method in ("sum", "normalized_sum"):
        total = (weighted_sum if method == "sum" else normalized_sum)(counted, weights)
        advantages = group_advantages(total, group_ids, std=std)
    else:
        own = "group" if method == "gdpo" else std
        each = {name: group_advantages(values, group_ids, std=own) for name, values in counted.items()}
        advantages = weighted_sum(each, weights)
    if method == "per_reward":
        norm = sum(weights.values())
        r = weighted_sum({name: probability(values) for name, values in each.items()}, weights) / norm
        advantages = advantages / norm
    else:
        r = probability(advantages)
    metrics = {f"reward_{name}": values.mean().item() for name, values in rewards.items()}
    metrics |= {f"reward_{name}_std": values.std(correction=0).item() for name, values in rewards.items()}
    return Combined(r, advantages, metrics)
