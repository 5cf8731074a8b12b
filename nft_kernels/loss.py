"""The loss as other trainers take it in: a module, and a function of raw rewards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS
from .ops import _validate
from .ops.advantages import group_advantages, optimality_probability
from .ops.nft_loss import NFTLossOutput, check_settings, nft_loss


class NFTLoss(torch.nn.Module):
    """``nft_loss`` with its settings made once; see there for what they mean. It has no parameters.

    Raises:
        ValueError, TypeError: settings that ``nft_loss`` would refuse.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        adv_clip_max: float = 5.0,
        kl_weight: float = 0.0,
        weighting: str = "adaptive",
        prediction: str = "v",
        weight_per: str = "sample",
        channel_dim: int | None = None,
        detach_weight: bool = True,
        kl_space: str = "v",
        reduction: str = "mean",
        backend: str = "auto",
    ):
        super().__init__()
        checked: dict[str, Any] = {
            "adv_clip_max": adv_clip_max,
            "kl_weight": kl_weight,
            "weighting": weighting,
            "prediction": prediction,
            "weight_per": weight_per,
            "channel_dim": channel_dim,
            "detach_weight": detach_weight,
            "kl_space": kl_space,
            "reduction": reduction,
        }
        check_settings(**checked)
        _validate.number("beta", beta, positive=True)
        _validate.choice("backend", backend, BACKENDS)
        self.settings = {"beta": beta, **checked, "backend": backend}

    def forward(
        self,
        v_theta: Tensor,
        v_old: Tensor,
        x_t: Tensor,
        x0: Tensor,
        t: Tensor,
        r: Tensor,
        *,
        v_ref: Tensor | None = None,
        beta: Tensor | None = None,
        mask: Tensor | None = None,
        policy_weight: Tensor | None = None,
        segments: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> NFTLossOutput:
        """``nft_loss`` of these tensors under the module's settings; ``beta`` (B,) takes the place of the module's."""
        return nft_loss(
            v_theta,
            v_old,
            x_t,
            x0,
            t,
            r,
            v_ref=v_ref,
            mask=mask,
            policy_weight=policy_weight,
            segments=segments,
            sample_weight=sample_weight,
            **(self.settings if beta is None else self.settings | {"beta": beta}),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def nft_loss_from_rewards(
    v_theta: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    std: str = "global",
    mode: str = "continuous",
    adv_clip_max: float = 5.0,
    **options: Any,
) -> NFTLossOutput:
    """``nft_loss`` of raw rewards: advantages within groups, then optimality probabilities, then the loss.

    The batch must hold whole groups. With several processes, or micro-batches that split groups, gather the rewards
    first and call ``group_advantages``, ``optimality_probability`` and ``nft_loss`` one after the other.

    Args:
        v_theta, v_old, x_t, x0, t, options: as for ``nft_loss``.
        rewards: (B,) floating point.
        group_ids: (B,) integers; equal ids are pictures of one prompt.
        std: as for ``group_advantages``.
        mode: as for ``optimality_probability``.
        adv_clip_max: the bound that advantages are clipped to, and the loss is scaled by.

    Raises:
        ValueError, TypeError, RuntimeError: as those three do.
    """
    advantages = group_advantages(rewards, group_ids, std=std)
    r = optimality_probability(advantages, adv_clip_max=adv_clip_max, mode=mode)
    return nft_loss(v_theta, v_old, x_t, x0, t, r, adv_clip_max=adv_clip_max, **options)
