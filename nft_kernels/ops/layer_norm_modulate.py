"""``layer_norm_modulate``: gated residuals, LayerNorm and one or two modulations of it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..backends import load
from ..backends._memory import new_empty
from ..reference import compute_dtype
from ..reference import layer_norm_modulate as reference
from . import _validate
from ._rows import backend_of, dense, fused


def _run(
    x: Tensor,
    y: Tensor | None,
    y2: Tensor | None,
    y_bias: Tensor | None,
    gate: Tensor | None,
    gate2: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, which is empty without ``y``, and the outputs, of which the second may be empty."""
    inputs = (x, y, y2, y_bias, gate, gate2, scale, shift, scale2, shift2)
    outputs = _fake(*inputs, eps, backend)
    load(backend).layer_norm_modulate(*map(dense, inputs), *outputs, eps)
    return outputs


def _fake(x, y, y2, y_bias, gate, gate2, scale, shift, scale2, shift2, eps, backend):
    wanted = (y is not None, True, scale2 is not None)
    h, out, out2 = (new_empty(x, x.shape) if want else x.new_empty(0) for want in wanted)
    return h, out, out2


def _gradient(
    h: Tensor,
    gate: Tensor | None,
    gate2: Tensor | None,
    scale: Tensor,
    scale2: Tensor | None,
    grad_h: Tensor | None,
    grad_out: Tensor | None,
    grad_out2: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and y2, of which those without a gate are empty."""
    inputs = (h, gate, gate2, scale, scale2, grad_h, grad_out, grad_out2)
    outputs = _fake_gradient(*inputs, eps, backend)
    load(backend).layer_norm_modulate_gradient(*map(dense, inputs), *outputs, eps)
    return outputs


def _fake_gradient(h, gate, gate2, scale, scale2, grad_h, grad_out, grad_out2, eps, backend):
    wanted = (True, gate is not None, gate2 is not None)
    grad_x, grad_y, grad_y2 = (new_empty(h, h.shape) if want else h.new_empty(0) for want in wanted)
    return grad_x, grad_y, grad_y2


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    x, y, y2, y_bias, gate, gate2, scale, _, scale2, _ = tensors
    ctx.dtype = compute_dtype(*tensors)
    h = x if y is None else output[0]
    # The residuals are only needed for the gradients of their gates, which frozen modulations have no use for.
    residual = (y, y_bias) if ctx.needs_input_grad[4] else (None, None)
    ctx.save_for_backward(h, *residual, y2 if ctx.needs_input_grad[5] else None, gate, gate2, scale, scale2)


def _modulation(grad: Tensor | None, normed: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if grad is None or not grad.numel():
        return None, None
    wide = grad.to(normed.dtype)
    return (wide * normed).sum(1), wide.sum(1)


def _backward(ctx: Any, gradient: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    h, y, y_bias, y2, gate, gate2, scale, scale2 = ctx.saved_tensors
    grad_x, grad_y, grad_y2 = gradient(h, gate, gate2, scale, scale2, *grads, ctx.eps, ctx.backend)
    residuals = (None if gate is None else grad_y, None if gate2 is None else grad_y2)
    results: list[Tensor | None] = [grad_x, *residuals, *[None] * 9]
    if any(ctx.needs_input_grad[3:]):
        # Training of adapters leaves these frozen, so plain PyTorch will do.
        dtype = ctx.dtype
        grad_h = grad_x.to(dtype)
        if ctx.needs_input_grad[3]:
            results[3] = (gate * grad_h.sum(1)).sum(0)
        if y is not None:
            results[4] = (grad_h * (y.to(dtype) if y_bias is None else y.to(dtype) + y_bias)).sum(1)
        if y2 is not None:
            results[5] = (grad_h * y2).sum(1)
        normed = F.layer_norm(h.to(dtype), h.shape[-1:], eps=ctx.eps)
        results[6:10] = (*_modulation(grads[1], normed), *_modulation(grads[2], normed))
    return tuple(results)


_call = fused("layer_norm_modulate", _run, _fake, _gradient, _fake_gradient, _setup_context, _backward)


def unchecked(
    x, scale, shift, scale2=None, shift2=None, *, y=None, gate=None, y_bias=None, y2=None, gate2=None, eps, backend
):
    """``layer_norm_modulate`` of arguments that fit, by a backend that can run: checks cost a model's forward, which
    knows both, a good part of the time that Python needs to launch it."""
    args = (x, y, y2, y_bias, gate, gate2, scale, shift, scale2, shift2, eps)
    if backend == "reference":
        return reference.layer_norm_modulate(*args)
    h, out, out2 = _call(*args, backend)
    return (x if y is None else h, out) if scale2 is None else (x if y is None else h, out, out2)


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    y_bias: Tensor | None = None,
    y2: Tensor | None = None,
    gate2: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """(1 + scale) LayerNorm(h) + shift with h = x + gate (y + y_bias) + gate2 y2, the step between two layers of a
    diffusion transformer (adaLN-Zero of Peebles and Xie, arXiv 2212.09748; two residuals and two modulations as in
    Stable Diffusion 3.5's dual attention).

    Computed in float32, or in float64 if any tensor is; h is rounded to x's dtype before it is normalized.

    Args:
        x: (B, S, D), float32, bfloat16, float16 or float64; rows that are not dense are copied.
        scale, shift: (B, D).
        scale2, shift2: (B, D), a second modulation of the same normalized rows.
        y, gate: (B, S, D) and (B, D), both or neither; without them h is x.
        y_bias: (D,), the bias of the layer that made y without it.
        y2, gate2: as y and gate, a second residual.
        eps: added to the variance.
        backend: ``auto``, ``native`` (on the CPU), ``triton`` or ``reference``.

    Returns:
        h and one or two outputs, all of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("x", x, "(B, S, D)", (3,))
    _validate.both_or_neither("y, gate", y, gate)
    _validate.both_or_neither("y2, gate2", y2, gate2)
    _validate.both_or_neither("scale2, shift2", scale2, shift2)
    for name, addition in (("y_bias", y_bias), ("y2", y2)):
        if addition is not None and y is None:
            raise ValueError(f"{name}: got one without y, accepted is one with y and gate")
    _validate.number("eps", eps, positive=True)
    for name, residual in (("y", y), ("y2", y2)):
        if residual is not None:
            _validate.tensor_like(name, residual, x, "x")
    if y_bias is not None:
        _validate.shaped("y_bias", y_bias, (x.shape[2],), "(D,)", x, "x")
    named = {"scale": scale, "shift": shift, "gate": gate, "gate2": gate2, "scale2": scale2, "shift2": shift2}
    for name, modulation in named.items():
        if modulation is not None or name in ("scale", "shift"):
            _validate.shaped(name, modulation, (x.shape[0], x.shape[2]), "(B, D)", x, "x")
    chosen = backend_of("layer_norm_modulate", backend, x)
    residuals = {"y": y, "gate": gate, "y_bias": y_bias, "y2": y2, "gate2": gate2}
    return unchecked(x, scale, shift, scale2, shift2, **residuals, eps=float(eps), backend=chosen)
