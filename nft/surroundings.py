"""What a run's numbers depend on in their last bits, beside its settings: where it runs, and by which versions."""

from __future__ import annotations

import os

import diffusers
import peft
import torch

import nft_kernels
from nft_kernels.backends import native


def surroundings(device: torch.device, processes: int) -> dict[str, str]:
    """Those of a run on ``device`` by so many processes, as a checkpoint keeps them."""
    if device.type == "cuda":
        where = {"device": torch.cuda.get_device_name(device)}
    else:
        where = {"device": f"cpu, {torch.backends.cpu.get_cpu_capability()}", "threads": str(torch.get_num_threads())}
    compiled = "not compiled" if native.why_not([torch.empty(0, device=device)]) else "compiled"
    kernels = f"{os.environ.get('NFT_KERNELS_BACKEND') or 'auto'}, {compiled}"
    packages = (nft_kernels, torch, diffusers, peft)
    versions = {package.__name__: package.__version__ for package in packages}
    return {**where, "processes": str(processes), "kernels": kernels, **versions}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, in words; nothing of what ``before`` does not tell."""
    return [f"{key} {now[key]} (was {before[key]})" for key in now if before.get(key, now[key]) != now[key]]
