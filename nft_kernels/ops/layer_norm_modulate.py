"""``layer_norm_modulate``: a gated residual, LayerNorm and one or two modulations of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import load
from ..reference import compute_dtype
from ..reference import layer_norm_modulate as reference
from . import _validate
from ._rows import backend_of, call, dense, matching


def _run(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, which is empty without ``y``, and the outputs, of which the second may be empty."""
    outputs = _fake(x, y, gate, scale, shift, scale2, shift2, eps)
    load("triton").layer_norm_modulate(*map(dense, (x, y, gate, scale, shift, scale2, shift2)), *outputs, eps)
    return outputs


def _fake(x, y, gate, scale, shift, scale2, shift2, eps):
    wanted = (y is not None, True, scale2 is not None)
    h, out, out2 = (x.new_empty(x.shape if want else 0) for want in wanted)
    return h, out, out2


def _gradient(
    h: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    grad_h: Tensor | None,
    grad_out: Tensor | None,
    grad_out2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, if there is a gate, of y."""
    grad_x, grad_y = _fake_gradient(h, gate, scale, scale2, grad_h, grad_out, grad_out2, eps)
    inputs = map(dense, (h, gate, scale, scale2, grad_h, grad_out, grad_out2))
    load("triton").layer_norm_modulate_gradient(*inputs, grad_x, grad_y, eps)
    return grad_x, grad_y


def _fake_gradient(h, gate, scale, scale2, grad_h, grad_out, grad_out2, eps):
    return h.new_empty(h.shape), h.new_empty(0 if gate is None else h.shape)


_op = torch.library.custom_op("nft_kernels::layer_norm_modulate", _run, mutates_args=())
_op.register_fake(_fake)
_gradient_op = torch.library.custom_op("nft_kernels::layer_norm_modulate_gradient", _gradient, mutates_args=())
_gradient_op.register_fake(_fake_gradient)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, gate, scale, _, scale2, _, ctx.eps = inputs
    h = x if y is None else output[0]
    # y is only needed for the gradient of the gate, which frozen modulations have no use for.
    ctx.save_for_backward(h, y if ctx.needs_input_grad[2] else None, gate, scale, scale2)


def _modulation(grad: Tensor | None, normed: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if grad is None or not grad.numel():
        return None, None
    wide = grad.to(normed.dtype)
    return (wide * normed).sum(1), wide.sum(1)


def _backward(ctx: Any, gradient: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    h, y, gate, scale, scale2 = ctx.saved_tensors
    grad_x, grad_y = gradient(h, gate, scale, scale2, *grads, ctx.eps)
    results: list[Tensor | None] = [grad_x, None if gate is None else grad_y, *[None] * 6]
    if any(ctx.needs_input_grad[2:]):
        # Training of adapters leaves these frozen, so plain PyTorch will do.
        dtype = compute_dtype(h, gate, scale, scale2)
        if y is not None:
            results[2] = (grad_x.to(dtype) * y.to(dtype)).sum(1)
        normed = F.layer_norm(h.to(dtype), h.shape[-1:], eps=ctx.eps)
        results[3:7] = (*_modulation(grads[1], normed), *_modulation(grads[2], normed))
    return tuple(results)


_op.register_autograd(lambda ctx, *grads: _backward(ctx, _gradient_op, grads), setup_context=_setup_context)


class _Fused(torch.autograd.Function):
    # With setup_context, apply would look up the signature of _run at every call, which takes longer than the rest.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _run(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, _gradient, grads)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """(1 + scale) LayerNorm(h) + shift with h = x + gate y, the step between two layers of a diffusion transformer
    (adaLN-Zero of Peebles and Xie, arXiv 2212.09748; two modulations as in Stable Diffusion 3.5's dual attention).

    Computed in float32, or in float64 if any tensor is; h is rounded to x's dtype before it is normalized.

    Args:
        x: (B, S, D), float32, bfloat16, float16 or float64; rows that are not dense are copied.
        scale, shift: (B, D).
        scale2, shift2: (B, D), a second modulation of the same normalized rows.
        y, gate: (B, S, D) and (B, D), both or neither; without them h is x.
        eps: added to the variance.
        backend: ``auto``, ``triton`` or ``reference``.

    Returns:
        h and one or two outputs, all of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("x", x)
    if x.ndim != 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, accepted is (B, S, D)")
    if (y is None) != (gate is None):
        raise ValueError("y, gate: got one of them, accepted are both or neither")
    if (scale2 is None) != (shift2 is None):
        raise ValueError("scale2, shift2: got one of them, accepted are both or neither")
    _validate.number("eps", eps, positive=True)
    if y is not None:
        _validate.tensor_like("y", y, x, "x")
    named = {"scale": scale, "shift": shift, "gate": gate, "scale2": scale2, "shift2": shift2}
    for name, modulation in named.items():
        if modulation is not None or name in ("scale", "shift"):
            matching(name, modulation, x, (x.shape[0], x.shape[2]), "(B, D)")
    args = (x, y, gate, scale, shift, scale2, shift2, float(eps))
    if backend_of("layer_norm_modulate", backend, x) == "reference":
        return reference.layer_norm_modulate(*args)
    h, out, out2 = call(_op, _Fused, *args)
    return (x if y is None else h, out) if scale2 is None else (x if y is None else h, out, out2)
