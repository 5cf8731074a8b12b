"""Which pictures of a rollout are worth training on, as pure functions of rewards by prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def _check(rewards: Tensor) -> None:
    if rewards.ndim != 2 or not rewards.numel():
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, accepted is (P, G) with P, G > 0")
    if not rewards.isfinite().all():
        raise ValueError("rewards: got NaN or infinity, accepted are finite values")


def extremes(rewards: Tensor, count: int) -> Tensor:
    """The best and the worst half of each group: of many cheap candidates those that contrast most, as Sol-RL keeps
    them (arXiv 2604.06916).

    Args:
        rewards: (P, E) of the candidates by prompt.
        count: how many are kept of each prompt's; of an odd number the best half is the larger one.

    Returns:
        (P, count) indices into the candidates, rising. Among equals the first ones count as better.

    Raises:
        ValueError: wrong shape, rewards that are not finite, or a count that is not within 1 and E.
    """
    _check(rewards)
    if not 1 <= count <= rewards.shape[1]:
        raise ValueError(f"count: got {count}, accepted are 1 to {rewards.shape[1]}, the candidates of a prompt")
    order = rewards.argsort(dim=1, descending=True, stable=True)
    worst = count // 2
    middle = order[:, count - worst : rewards.shape[1] - worst]
    kept = rewards.new_ones(rewards.shape, dtype=torch.bool).scatter(1, middle, False)
    return kept.nonzero()[:, 1].view(-1, count)


def uninformative(rewards: Tensor, mean: float, std: float) -> Tensor:
    """Groups whose rewards are all high and hardly differ, so that the difference is the reward's noise: Edit-R1's
    filter (arXiv 2510.16888).

    Args:
        rewards: (P, G) by prompt.
        mean: a group's mean has to reach it,
        std: and its deviation (biased) to be below it.

    Returns:
        (P,) bool.

    Raises:
        ValueError: wrong shape, or rewards that are not finite.
    """
    _check(rewards)
    return (rewards.mean(1) >= mean) & (rewards.std(1, correction=0) < std)
