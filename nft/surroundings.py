"""What a run's numbers depend on beside its settings: the pipeline's weights, and, in their last bits, where it runs
and by which versions."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

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
    compiled = "not compiled" if native.why_not(torch.empty(0, device=device)) else "compiled"
    kernels = f"{os.environ.get('NFT_KERNELS_BACKEND') or 'auto'}, {compiled}"
    packages = (nft_kernels, torch, diffusers, peft)
    versions = {package.__name__: package.__version__ for package in packages}
    return {**where, "processes": str(processes), "kernels": kernels, **versions}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs, in words; nothing of what ``before`` does not tell."""
    return [f"{key} {now[key]} (was {before[key]})" for key in now if before.get(key, now[key]) != now[key]]


@torch.no_grad()
def fingerprint(modules: Iterable[torch.nn.Module]) -> str:
    """A checksum of some thousand numbers of every weight, spread evenly: that of gigabytes would take as long as to
    load them. It is the same in float32 and bfloat16, and whatever names a version of a library gives the weights."""
    digests = set()
    for module in modules:
        for weight in module.state_dict().values():
            flat = weight.flatten()
            some = flat[:: max(1, flat.numel() // 1024)].to("cpu", torch.bfloat16)
            digests.add(hashlib.sha256(some.contiguous().view(torch.uint8).numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
