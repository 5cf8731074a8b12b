"""What is shared by the ops' backwards, which are kernels: autograd knows nothing of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def refuse_second(gradients: Gradients) -> Gradients:
    """Gradients that are asked for with ``create_graph=True``: a derivative of them, which would come out as 0, is an
    error of its own."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    tensors = [x for x in gradients if x is not None]
    # Torch's own once_differentiable does so only if a gradient that comes in requires one.
    error = torch._C._functions.DelayedError(
        "nft_kernels: it can be differentiated once, and twice with backend='reference'", len(tensors)
    )
    marked = error(*[x.detach().requires_grad_() for x in tensors])
    # Of a single one it makes no tuple.
    each = iter((marked,) if isinstance(marked, Tensor) else marked)
    return tuple(None if x is None else next(each) for x in gradients)


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate the backward of an autograd function that is no function of autograd's itself."""

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Gradients:
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        return refuse_second(gradients)

    return once
