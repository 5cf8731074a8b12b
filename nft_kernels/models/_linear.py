"""``F.linear`` of float32 on the CPU by oneDNN, where there is AVX-512: MKL, which torch calls for it, uses that on
Intel's processors only, and with AVX2 multiplies half as fast as AMD's can."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._rows import function


@functools.cache
def _onednn() -> Any:
    """The product by the operator that torch.compile calls for a linear layer. None without one or without AVX-512, and
    where rows depend on how many there are, as in the oneDNN of torch 2.6: a sample's result must not depend on its
    batch."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if operator is None:
        return None

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return operator(x, weight, bias, "none", [], "")

    x = torch.arange(64 * 128, dtype=torch.float32, device="cpu").sin().view(64, 128)
    return product if torch.equal(product(x[:8], x), product(x, x)[:8]) else None


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn()(x, weight, bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grads: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    product, (x, weight), (grad,) = _onednn(), ctx.saved_tensors, grads
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = product(rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
    grad_weight = product(rows.t(), x.reshape(len(rows), -1).t()) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


_Linear: Any = function(_run, _setup_context, _backward)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of tensors on the CPU: x (..., K) times the transpose of weight (N, K), plus bias (N,).

    It can be differentiated once. F.linear itself runs wherever oneDNN's does not fit.
    """
    fits = x.dtype == weight.dtype == torch.float32 and x.numel() and not torch.is_autocast_enabled("cpu")
    if not fits or _onednn() is None:
        return F.linear(x, weight, bias)
    return (_Linear.apply if torch.is_grad_enabled() else _run)(x, weight, bias)
