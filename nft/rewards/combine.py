"""Several rewards as one: from scores per reward to advantages and optimality probabilities, as pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nft_kernels import group_advantages, optimality_probability

Rewards = Mapping[str, Tensor]
Weights = Mapping[str, float]


class Combined(NamedTuple):
    """``r`` and ``advantages`` (B,), and ``metrics`` with every reward's mean and deviation."""

    r: Tensor
    advantages: Tensor
    metrics: dict[str, float]


def _validate(rewards: Rewards, weights: Weights) -> None:
    if not rewards:
        raise ValueError("rewards: got none, accepted is at least one")
    if set(weights) != set(rewards):
        raise ValueError(f"weights: got {sorted(weights)}, accepted is one for each of {sorted(rewards)}")
    if not any(weights.values()):
        raise ValueError("weights: got only zeros, accepted is at least one that is not")


def _weighted(terms: Rewards, weights: Weights) -> Tensor:
    return sum((weights[name] * term for name, term in terms.items()), torch.zeros(()))


def weighted_sum(rewards: Rewards, weights: Weights) -> Tensor:
    """sum_k w_k R_k, (B,)."""
    return _weighted(rewards, weights)


def normalized_sum(rewards: Rewards, weights: Weights) -> Tensor:
    """sum_k w_k (R_k - mean) / (std + 1e-4) over all pictures, with the biased deviation: a reward's weight no longer
    depends on its unit."""
    everything = torch.zeros(len(next(iter(rewards.values()))), dtype=torch.long)
    return _weighted({name: group_advantages(values, everything) for name, values in rewards.items()}, weights)


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
        weights: one number for every reward.
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
        ValueError, TypeError: an unknown method, weights that do not match, or what ``group_advantages`` refuses.
    """
    _validate(rewards, weights)
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, accepted are {', '.join(METHODS)}")
    advantages, r = METHODS[method](rewards, weights, group_ids, std, adv_clip_max, mode)
    metrics = {f"reward_{name}": values.mean().item() for name, values in rewards.items()}
    metrics |= {f"reward_{name}_std": values.std(correction=0).item() for name, values in rewards.items()}
    return Combined(r, advantages, metrics)


def _of_sum(total: Callable[[Rewards, Weights], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def method(
        rewards: Rewards, weights: Weights, group_ids: Tensor, std: str, clip: float, mode: str
    ) -> tuple[Tensor, Tensor]:
        advantages = group_advantages(total(rewards, weights), group_ids, std=std)
        return advantages, optimality_probability(advantages, adv_clip_max=clip, mode=mode)

    return method


def _gdpo(
    rewards: Rewards, weights: Weights, group_ids: Tensor, std: str, clip: float, mode: str
) -> tuple[Tensor, Tensor]:
    each = {name: group_advantages(values, group_ids, std="group") for name, values in rewards.items()}
    advantages = _weighted(each, weights)
    return advantages, optimality_probability(advantages, adv_clip_max=clip, mode=mode)


def _per_reward(
    rewards: Rewards, weights: Weights, group_ids: Tensor, std: str, clip: float, mode: str
) -> tuple[Tensor, Tensor]:
    if min(weights.values()) < 0:
        raise ValueError(f"weights: got {dict(weights)}, accepted for per_reward are numbers of 0 and above")
    each = {name: group_advantages(values, group_ids, std=std) for name, values in rewards.items()}
    r = {name: optimality_probability(values, adv_clip_max=clip, mode=mode) for name, values in each.items()}
    total = sum(weights.values())
    return _weighted(each, weights) / total, _weighted(r, weights) / total


METHODS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "sum": _of_sum(weighted_sum),
    "normalized_sum": _of_sum(normalized_sum),
    "gdpo": _gdpo,
    "per_reward": _per_reward,
}
