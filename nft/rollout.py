"""Rollouts: solve dx/dt = v from noise at t = 1 to clean latents at t = 0 with any table of times."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nft_kernels import add_noise

from .policy import Policy


def times(steps: int, shift: float) -> Tensor:
    """``steps`` + 1 times from 1 to 0 with SD3's shift: t = shift s / (1 + (shift-1) s)."""
    s = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return (shift * s / (1 + (shift - 1) * s)).float()


@torch.no_grad()
def rollout(policy: Policy, prompts: list[str], seeds: list[int], grid: Tensor, solver: str, batch: int) -> Tensor:
    """Clean latents (B, C, H, W), one per prompt and seed. Only the final latents are kept.

    Args:
        policy: evaluated with the adapter in use.
        prompts, seeds: one of each per picture; the initial noise depends on its seed only.
        grid: descending times from 1 to 0.
        solver: ``euler``, or ``heun`` (second order, two evaluations a step, the last one Euler).
        batch: pictures per evaluation.
    """
    grid = grid.to(policy.device)
    finished = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        embeds, pooled = policy.embed(prompts[part])
        count = len(embeds)
        zeros = torch.zeros(count, *policy.latent_shape, device=policy.device)
        x = add_noise(zeros, torch.ones_like(zeros[:, 0, 0, 0]), seed=torch.tensor(seeds[part], device=policy.device))
        for now, after in pairwise(grid):
            v = policy.velocity(x, now.expand(count), embeds, pooled)
            ahead = x + (after - now) * v
            if solver == "heun" and after > 0:
                v = (v + policy.velocity(ahead, after.expand(count), embeds, pooled)) / 2
                ahead = x + (after - now) * v
            x = ahead
        finished.append(x)
    return torch.cat(finished)
