"""Shared by the ops on rows of a transformer, whose kernels are C++ on the CPU and Triton on GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose


def backend_of(
    op: str,
    backend: str,
    x: Tensor,
    kernels: tuple[str, ...] = ("native", "triton"),
    native_dtype: torch.dtype | None = None,
) -> str:
    """``choose`` for an op that has only these kernels, the native ones for the CPU alone and all dtypes or one.

    Raises:
        ValueError, RuntimeError: as ``choose``, also for a backend without a kernel.
    """
    named = os.environ.get("NFT_KERNELS_BACKEND") if backend == "auto" else None
    wish, origin = named or backend, "NFT_KERNELS_BACKEND" if named else "backend"
    here = kernels if x.is_cpu else tuple(kernel for kernel in kernels if kernel != "native")
    if wish in ("native", "triton") and wish not in here:
        where, accepted = f" on {x.device.type}" if wish in kernels else "", ", ".join((*here, "reference"))
        raise RuntimeError(f"{origin}: {wish!r} cannot run: it has no kernel for {op}{where}, accepted are {accepted}")
    if wish in ("auto", "native") and native_dtype not in (None, x.dtype):
        if wish == "native":
            raise RuntimeError(f"{origin}: 'native' cannot run: it takes {str(native_dtype)[6:]}, not {x.dtype}")
        here = tuple(kernel for kernel in here if kernel != "native")
    if wish != "auto" or (x.is_cpu and "native" in here):
        return choose(backend, x)
    if x.device.type != "cuda" or "triton" not in here:
        return "reference"
    try:
        return choose("triton", x)
    except RuntimeError:
        return "reference"


def dense(x: Any) -> Any:
    """``x``, copied if it is a tensor whose rows are not dense."""
    return x.contiguous() if isinstance(x, Tensor) and x.stride(-1) != 1 else x


def function(
    original: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[[Any, tuple[Any, ...]], tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """The op outside of torch.compile, which can be differentiated once."""

    class Fused(torch.autograd.Function):
        run = staticmethod(original)

        # With autograd's own setup_context, apply would look up the signature of ``run`` at every call, which takes
        # longer than the rest.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = original(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return backward(ctx, grads)

    return Fused


def call(op: Any, function: Any, *args: Any) -> Any:
    """The op that the compiler knows while it looks, else the autograd function, or without a gradient what it runs:
    small tensors take less time than autograd."""
    if torch.compiler.is_compiling():
        return op(*args)
    return function.apply(*args) if torch.is_grad_enabled() else function.run(*args)
