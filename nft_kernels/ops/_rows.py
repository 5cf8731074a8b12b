"""Shared by the ops on rows of a transformer, which have Triton kernels only."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from . import _validate


def backend_of(op: str, backend: str, x: Tensor) -> str:
    """``choose`` without the C++ kernels: ``triton`` or ``reference``.

    Raises:
        ValueError, RuntimeError: as ``choose``, also for ``native``.
    """
    named = os.environ.get("NFT_KERNELS_BACKEND") if backend == "auto" else None
    wish = named or backend
    if wish == "native":
        origin = "NFT_KERNELS_BACKEND" if named else "backend"
        raise RuntimeError(f"{origin}: 'native' cannot run: it has no kernel for {op}, accepted are triton, reference")
    if wish != "auto":
        return choose(backend, x)
    if x.device.type != "cuda":
        return "reference"
    try:
        return choose("triton", x)
    except RuntimeError:
        return "reference"


def dense(x: Any) -> Any:
    """``x``, copied if it is a tensor whose rows are not dense."""
    return x.contiguous() if isinstance(x, Tensor) and x.stride(-1) != 1 else x


def matching(name: str, x: Any, model: Tensor, shape: tuple[int, ...], kind: str) -> None:
    """``x`` must be floating, of ``shape``, which ``kind`` describes, and on the device of ``model``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, accepted is a tensor of shape {shape}")
    _validate.floating(name, x.dtype)
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is {kind} = {shape}")
    if x.device != model.device:
        raise ValueError(f"{name}: got device {x.device}, accepted is {model.device}")


def function(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    setup_context: Callable[..., None],
    backward: Callable[[Any, tuple[Any, ...]], tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """The op outside of torch.compile, which can be differentiated once."""

    class Fused(torch.autograd.Function):
        # With autograd's own setup_context, apply would look up the signature of ``run`` at every call, which takes
        # longer than the rest.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor | tuple[Tensor, ...]:
            output = run(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return backward(ctx, grads)

    return Fused


def call(op: Any, function: Any, *args: Any) -> Any:
    """The op that the compiler knows while it looks, else the autograd function."""
    return op(*args) if torch.compiler.is_compiling() else function.apply(*args)
