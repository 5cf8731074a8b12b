"""Rollouts: from noise at t = 1 to clean latents at t = 0 with any solver of ``nft_kernels.solvers``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nft_kernels import add_noise, solver_step
from nft_kernels.solvers import SolverTable, table

from .config import Config
from .policy import Policy, blocks


def solver_options(config: Config, epoch: int) -> dict[str, Any]:
    """Options of the rollout's solver in one epoch (from 0): the settings' own, and where the window stands.

    A ``sliding`` window moves on by a step every ``window_epochs`` and starts over at the end, as MixGRPO's does; a
    ``random`` one lies anywhere in the first half of the steps, where Flow-GRPO-Fast has it.
    """
    if config.window is None:
        return config.rollout_options
    move, steps = epoch // config.window_epochs, config.rollout_steps
    if config.window_order == "sliding":
        start = move % (steps - config.window + 1)
    else:
        start = random.Random(f"{config.seed} {move} window").randint(0, max(steps // 2 - config.window, 0))
    return {**config.rollout_options, "window": (start, start + config.window)}


def noisy(solver: SolverTable) -> slice:
    """The rows that draw noise, which are consecutive in every solver that a rollout takes."""
    found = solver.noisy
    return slice(found[0], found[-1] + 1) if found else slice(0, 0)


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
    reference: bool = False,
    states: list[Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Clean latents (B, C, H, W), one per prompt and seed. Only those are kept, unless ``states`` asks for more.

    Args:
        policy: evaluated with the adapter in use.
        prompts, seeds: one of each per picture; all its noise depends on its seed only.
        grid: falling times from 1 to 0.
        solver: a name in ``nft_kernels.solvers.SOLVERS``.
        batch: pictures per evaluation. A picture does not depend on it on a CPU; on a GPU it does by rounding, and the
            last batch is filled up so that all pictures go through the same shapes.
        guidance: scale of classifier-free guidance against the empty prompt, a second evaluation per step, as the
            model's pipeline has it; none when None. DiffusionNFT's rollouts use none.
        reference: guide against the reference model and the same prompt instead, v_ref + guidance (v - v_ref), as CFGRL
            does (Frans et al., arXiv 2505.23458). The adapter ``default`` has to be in use, and not merged.
        states: a list to which the states before and after every row with noise are added, (B, K + 1, C, H, W) for K
            such rows.
        options: the solver's own, such as ``eta``.

    Raises:
        ValueError, TypeError: a solver, grid or option that does not fit, named.
    """
    steps = table(solver, [float(t) for t in grid], **options)
    # A multiple of 16 rows gives the same bits on a CPU: where MKL was used before this package could tell it how, it
    # sums those of 8 in another order with AVX-512. A GPU gives them for the same number of rows only.
    unit = 16 if policy.device.type == "cpu" else batch
    finished, kept = [], []
    for index in blocks(len(prompts), batch + -batch % unit, unit):
        count, part = len(index), [prompts[i] for i in index]
        conditions = policy.embed(part)
        keys = torch.tensor([seeds[i] for i in index], device=policy.device)
        ones = torch.ones(count, device=policy.device)
        x = add_noise(torch.zeros(count, *policy.latent_shape, device=policy.device), ones, seed=keys)
        history: tuple[Tensor, ...] = ()
        empty = None if guidance is None or reference else policy.embed([""] * count)
        path = [x]
        for i, t in enumerate(steps.times):
            v = policy.velocity(x, t * ones, *conditions)
            v_uncond, scale = None, guidance
            if empty is not None:
                v_uncond = policy.velocity(x, t * ones, *empty)
                if policy.model.guide:
                    v, v_uncond, scale = policy.model.guide(v, v_uncond, scale), None, None
            if reference:
                policy.use(None)
                v_uncond = policy.velocity(x, t * ones, *conditions)
                policy.use("default")
            x, history, *_ = solver_step(steps, i, x, v, history, seed=keys, v_uncond=v_uncond, guidance=scale)
            if states is not None:
                path.append(x)
        finished.append(x)
        if states is not None:
            rows = noisy(steps)
            kept.append(torch.stack(path[rows.start : rows.stop + 1], 1))
    if states is not None:
        states.append(torch.cat(kept)[: len(prompts)])
    return torch.cat(finished)[: len(prompts)]
