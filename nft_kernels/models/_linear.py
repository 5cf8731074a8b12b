"""``F.linear`` of float32 on the CPU by oneDNN, where there is AVX-512: MKL, which torch calls for it, uses that on
Intel's processors only, and with AVX2 multiplies half as fast as AMD's can."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _product(operator: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return operator(x, weight, bias, "none", [], "")


@functools.cache
def _onednn() -> Any:
    """The operator that torch.compile calls for a linear layer. None without one or without AVX-512, and where rows
    depend on how many there are, as in the oneDNN of torch 2.6: a sample's result must not depend on its batch."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    operator = getattr(getattr(torch.ops.mkldnn, "_linear_pointwise", None), "default", None)
    if operator is not None:
        x = torch.arange(64 * 128, dtype=torch.float32, device="cpu").sin().view(64, 128)
        few, many = (_product(operator, x[:rows], x) for rows in (8, 64))
        operator = operator if torch.equal(few, many[:8]) else None
    return operator


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(_onednn(), x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator, (x, weight) = _onednn(), ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = _product(operator, rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_weight = _product(operator, rows.t(), x.reshape(len(rows), -1).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of tensors on the CPU: x (..., K) times the transpose of weight (N, K), plus bias (N,).

    It can be differentiated once. F.linear itself runs wherever oneDNN's does not fit.
    """
    fits = x.dtype == weight.dtype == torch.float32 and x.numel() and not torch.is_autocast_enabled("cpu")
    if not fits or _onednn() is None:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else _product(_onednn(), x, weight, bias)
