"""From rewards to optimality probabilities (arXiv 2509.16117, section 3.3). Plain PyTorch: B numbers a step."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _validate

STDS = ("global", "group")
MODES = ("continuous", "positive_only", "negative_only", "one_only", "binary")


def group_advantages(rewards: Tensor, group_ids: Tensor, *, std: str = "global") -> Tensor:
    """A = (reward - mean over the prompt's group) / (std + 1e-4), with the biased standard deviation.

    Args:
        rewards: (B,) floating point.
        group_ids: (B,) integers; equal ids are one group.
        std: ``global`` divides by the deviation of all rewards, ``group`` by that of the sample's group.

    Returns:
        (B,) tensor of the rewards' dtype.

    Raises:
        ValueError: wrong shapes, devices that differ, non-finite rewards, or an unknown ``std``.
        TypeError: rewards that are no floating-point tensor or group ids that are no integer one.
    """
    _validate.tensor("rewards", rewards)
    _validate.floating("rewards", rewards.dtype)
    _validate.tensor("group_ids", group_ids)
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise TypeError(f"group_ids: got {group_ids.dtype}, accepted are integer tensors")
    _validate.same_device("group_ids", group_ids, rewards, "rewards")
    if rewards.ndim != 1 or not len(rewards):
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, accepted is (B,) with B > 0")
    if group_ids.shape != rewards.shape:
        raise ValueError(f"group_ids: got shape {tuple(group_ids.shape)}, accepted is {tuple(rewards.shape)}")
    _validate.choice("std", std, STDS)
    return _op(rewards, group_ids, std) if torch.compiler.is_compiling() else _advantages(rewards, group_ids, std)


def _advantages(rewards: Tensor, group_ids: Tensor, std: str) -> Tensor:
    if not rewards.isfinite().all():
        raise ValueError("rewards: got NaN or infinity, accepted are finite values")
    x = rewards.double()
    _, inverse, counts = group_ids.unique(return_inverse=True, return_counts=True)

    def group_mean(values: Tensor) -> Tensor:
        return (values.new_zeros(len(counts)).index_add(0, inverse, values) / counts)[inverse]

    centred = x - group_mean(x)
    deviation = x.std(correction=0) if std == "global" else group_mean(centred.square()).sqrt()
    return (centred / (deviation + 1e-4)).to(rewards.dtype)


# How many groups there are the compiler cannot know.
_op = torch.library.custom_op("nft_kernels::group_advantages", _advantages, mutates_args=())
_op.register_fake(lambda rewards, group_ids, std: torch.empty_like(rewards))


def optimality_probability(A: Tensor, *, adv_clip_max: float = 5.0, mode: str = "continuous") -> Tensor:
    """r = clip(clip(A, -M, M) / (2M) + 1/2, 0, 1) with M = ``adv_clip_max``.

    Args:
        A: advantages, any shape, floating point.
        adv_clip_max: M > 0.
        mode: ``continuous`` uses A; ``positive_only`` clips A to [0, M]; ``negative_only`` to [-M, 0];
            ``one_only`` uses 1 where A > 0 and 0 elsewhere; ``binary`` uses the sign of A. All but
            ``continuous`` are the ablations of the official implementation's ``adv_mode``.

    Returns:
        tensor in [0, 1] of A's shape and dtype.

    Raises:
        ValueError: NaN advantages (not within torch.compile), M that is not positive and finite, or an unknown mode.
        TypeError: A that is no floating-point tensor, or M that is no number.
    """
    _validate.tensor("A", A)
    _validate.floating("A", A.dtype)
    _validate.number("adv_clip_max", adv_clip_max, positive=True)
    _validate.choice("mode", mode, MODES)
    if not torch.compiler.is_compiling() and A.isnan().any():
        raise ValueError("A: got NaN, accepted are numbers")
    used = {
        "continuous": lambda: A,
        "positive_only": lambda: A.clamp_min(0),
        "negative_only": lambda: A.clamp_max(0),
        "one_only": lambda: (A > 0).to(A.dtype),
        "binary": lambda: A.sign(),
    }[mode]()
    # Half precision may not hold M. Divided first, as 2M may be infinite.
    return ((used.double() / float(adv_clip_max)).clamp(-1, 1) / 2 + 0.5).to(A.dtype)
