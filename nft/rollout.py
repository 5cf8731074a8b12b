"""Rollouts: from noise at t = 1 to clean latents at t = 0 with any solver of ``nft_kernels.solvers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nft_kernels import add_noise, solver_step
from nft_kernels.solvers import schedule, table

from .policy import Policy, blocks


def times(steps: int, shift: float, terminal: float | None = None) -> Tensor:
    """``steps`` + 1 times from 1 to 0 with SD3's shift, in the float32 that the model is given. Those above 0 are
    stretched so that the last of them is ``terminal``, as diffusers' ``shift_terminal`` does."""
    *above, zero = schedule(steps, shift=shift)
    if terminal and steps > 1:
        above = [1 - (1 - t) / (1 - above[-1]) * (1 - terminal) for t in above]
    return torch.tensor([*above, zero], dtype=torch.float32)


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: list[str],
    seeds: list[int],
    grid: Sequence[float] | Tensor,
    solver: str,
    batch: int,
    *,
    guidance: float | None = None,
    **options: Any,
) -> Tensor:
    """Clean latents (B, C, H, W), one per prompt and seed. Only the final latents are kept.

    Args:
        policy: evaluated with the adapter in use.
        prompts, seeds: one of each per picture; all its noise depends on its seed only.
        grid: falling times from 1 to 0.
        solver: a name in ``nft_kernels.solvers.SOLVERS``.
        batch: pictures per evaluation. A picture does not depend on it on a CPU; on a GPU it does by rounding, and the
            last batch is filled up so that all pictures go through the same shapes.
        guidance: scale of classifier-free guidance against the empty prompt, a second evaluation per step; none when
            None. DiffusionNFT's rollouts use none.
        options: the solver's own, such as ``eta``.

    Raises:
        ValueError, TypeError: a solver, grid or option that does not fit, named.
    """
    steps = table(solver, [float(t) for t in grid], **options)
    # A multiple of 8 rows gives the same bits on the CPU; a GPU gives them for the same number of rows only.
    unit = 8 if policy.device.type == "cpu" else batch
    finished = []
    for index in blocks(len(prompts), batch + -batch % unit, unit):
        count, part = len(index), [prompts[i] for i in index]
        conditions = policy.embed(part)
        keys = torch.tensor([seeds[i] for i in index], device=policy.device)
        ones = torch.ones(count, device=policy.device)
        x = add_noise(torch.zeros(count, *policy.latent_shape, device=policy.device), ones, seed=keys)
        history: tuple[Tensor, ...] = ()
        empty = None if guidance is None else policy.embed([""] * count)
        for i, t in enumerate(steps.times):
            v = policy.velocity(x, t * ones, *conditions)
            v_uncond = None if empty is None else policy.velocity(x, t * ones, *empty)
            x, history, *_ = solver_step(steps, i, x, v, history, seed=keys, v_uncond=v_uncond, guidance=guidance)
        finished.append(x)
    return torch.cat(finished)[: len(prompts)]
