"""Choice of backend: an explicit choice that cannot run raises, ``auto`` falls back to the reference."""

from __future__ import annotations

import os

from torch import Tensor

from . import native

BACKENDS = ("auto", "native", "triton", "reference")


def choose(backend: str, *tensors: Tensor) -> str:
    """Resolve ``backend`` for these tensors; the variable NFT_KERNELS_BACKEND overrides ``auto``.

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
    if backend == "triton":
        raise RuntimeError(f"{origin}: 'triton' has no kernels in this version; use 'auto' or 'reference'")
    reason = native.why_not(tensors)
    if reason is None:
        return "native"
    if backend == "native":
        raise RuntimeError(f"{origin}: 'native' cannot run: {reason}")
    return "reference"
