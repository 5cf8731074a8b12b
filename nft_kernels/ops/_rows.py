"""Shared by the ops on rows of a transformer, whose kernels are C++ on the CPU and Triton on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import choose
from ._autograd import once_differentiable, refuse_second


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
    here = [kernel for kernel in kernels if kernel != "native" or x.is_cpu]

    def lacking(name: str) -> str | None:
        if name not in here:
            where, accepted = f" on {x.device.type}" if name in kernels else "", ", ".join((*here, "reference"))
            return f"it has no kernel for {op}{where}, accepted are {accepted}"
        if name == "native" and native_dtype not in (None, x.dtype):
            return f"it takes {str(native_dtype)[6:]}, not {x.dtype}"
        return None

    return choose(backend, x, lacking=lacking)


def dense(x: Any) -> Any:
    """``x``, copied if it is a tensor whose rows are not dense, or whose lazy negation memory knows nothing of."""
    if not isinstance(x, Tensor):
        return x
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 else x.contiguous()


def function(
    original: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[[Any, tuple[Any, ...]], tuple[Tensor | None, ...]],
) -> type[torch.autograd.Function]:
    """The op outside of torch.compile, which can be differentiated once."""

    class Fused(torch.autograd.Function):
        # With autograd's own setup_context, apply would look up the signature of this at every call, which takes
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


def fused(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    gradient: Callable[..., Any],
    fake_gradient: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[[Any, Callable[..., Any], tuple[Any, ...]], tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """An op with a gradient. The compiler is shown custom ops; else it is an autograd function, or without a gradient
    ``run`` itself: small tensors take less time than autograd.

    Args:
        name: of the op in ``torch.ops.nft_kernels``.
        run, gradient: the kernels, and ``fake`` and ``fake_gradient`` their outputs without contents.
        setup_context: keeps in ``ctx`` what the backward needs.
        backward: gradients of the inputs by ``ctx``, ``gradient`` and the outputs' gradients.
    """
    op = torch.library.custom_op(f"nft_kernels::{name}", run, mutates_args=())
    op.register_fake(fake)
    gradient_op = torch.library.custom_op(f"nft_kernels::{name}_gradient", gradient, mutates_args=())
    gradient_op.register_fake(fake_gradient)
    op.register_autograd(
        lambda ctx, *grads: refuse_second(backward(ctx, gradient_op, grads)), setup_context=setup_context
    )
    eager: Any = function(run, setup_context, lambda ctx, grads: backward(ctx, gradient, grads))

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        return eager.apply(*args) if torch.is_grad_enabled() else run(*args)

    return call
