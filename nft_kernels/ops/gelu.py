"""``gelu``: GELU in its tanh form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import load
from ..backends._memory import new_empty
from ..reference import gelu as reference
from . import _validate
from ._rows import backend_of, fused


def _run(x: Tensor, backend: str) -> Tensor:
    out = new_empty(x, x.shape)
    load(backend).gelu(x.resolve_neg().contiguous(), None, out)
    return out


def _fake(x, *_):
    return x.new_empty(x.shape)


def _gradient(x: Tensor, grad: Tensor, backend: str) -> Tensor:
    out = new_empty(x, x.shape)
    load(backend).gelu(x.resolve_neg().contiguous(), grad.resolve_neg().contiguous(), out)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, gradient: Any, grads: tuple[Tensor]) -> tuple[Tensor, None]:
    return gradient(*ctx.saved_tensors, *grads, ctx.backend), None


_call = fused("gelu", _run, _fake, _gradient, _fake, _setup_context, _backward)


def unchecked(x: Tensor, *, backend: str) -> Tensor:
    """``gelu`` of what fits, by a backend that can run."""
    return reference.gelu(x) if backend == "reference" else _call(x, backend)


def gelu(x: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel, arXiv 1606.08415), with a gradient.

    It is computed as x sigmoid(2u), which for negative x keeps the digits that (1 + tanh u) / 2 loses, in float32, or
    in float64 if x is.

    Args:
        x: (B, ...), float32, bfloat16, float16 or float64, any strides.
        backend: ``auto``, ``native`` (on the CPU) or ``reference``, which is torch's own and there for GPUs.

    Returns:
        A dense tensor of x's shape and dtype.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("x", x)
    return unchecked(x, backend=backend_of("gelu", backend, x, kernels=("native",)))
