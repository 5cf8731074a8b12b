"""Choice of backend: an explicit choice that cannot run raises, ``auto`` falls back to the reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native

BACKENDS = ("auto", "native", "triton", "reference")
MAX_DIMS = 12
"""Of the View in csrc/args.h."""


def load(backend: str) -> ModuleType:
    """Module with the kernels of ``native`` or ``triton`` and a ``why_not`` that says whether they can run."""
    if backend == "native":
        return native
    # Only here, as triton is optional.
    from . import triton

    return triton


def why_not(backend: str, x: Tensor) -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "transforms of torch.func see into plain PyTorch only"
    # Without autograd, as under no_grad, a tangent would be lost and nothing said.
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives see into plain PyTorch only"
    if x.ndim > MAX_DIMS:
        return f"kernels take at most {MAX_DIMS} dimensions"
    return load(backend).why_not(x)


def choose(backend: str, x: Tensor, *, lacking: Callable[[str], str | None] = lambda backend: None) -> str:
    """Resolve ``backend`` for an op on x; NFT_KERNELS_BACKEND overrides ``auto``.

    Args:
        backend: one of ``BACKENDS``.
        x: a tensor of the op, all of which are on one device.
        lacking: why a backend has no kernel for an op, or None where it has.

    Raises:
        ValueError: an unknown name.
        RuntimeError: an explicit choice that cannot run here, with the reason.
    """
    origin = "backend"
    if backend == "auto" and os.environ.get("NFT_KERNELS_BACKEND"):
        backend, origin = os.environ["NFT_KERNELS_BACKEND"], "NFT_KERNELS_BACKEND"
    if backend not in BACKENDS:
        raise ValueError(f"{origin}: got {backend!r}, accepted are {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    if backend != "auto":
        reason = lacking(backend) or why_not(backend, x)
        if reason is not None:
            raise RuntimeError(f"{origin}: {backend!r} cannot run: {reason}")
        return backend
    # On the CPU Triton only interprets, which is for tests.
    candidates = ("native",) if x.is_cpu else ("native", "triton")
    for candidate in candidates:
        if (lacking(candidate) or why_not(candidate, x)) is None:
            return candidate
    return "reference"
