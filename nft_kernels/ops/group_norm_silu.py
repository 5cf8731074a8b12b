"""``group_norm_silu``: group normalization and SiLU of pictures, by a kernel for the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import load
from ..backends._memory import new_empty
from ..reference import group_norm_silu as reference
from . import _validate
from ._rows import backend_of, dense


def _run(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, backend: str) -> Tensor:
    pixels = x.resolve_neg().permute(0, 2, 3, 1).contiguous()
    out = new_empty(x, pixels.shape)
    load(backend).group_norm_silu(pixels, dense(weight), dense(bias), out, groups, eps)
    return out.permute(0, 3, 1, 2)


def _fake(x, *_):
    return x.new_empty(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


_op = torch.library.custom_op("nft_kernels::group_norm_silu", _run, mutates_args=())
_op.register_fake(_fake)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float, backend: str = "auto"
) -> Tensor:
    """silu(group_norm(x)) (Wu and He, arXiv 1803.08494), as between the convolutions of diffusers' decoders.

    Computed in float32, or in float64 if x is. The kernel has no gradient: where one is needed, ``auto`` takes the
    reference. A sample's result depends neither on the batch it is in nor on the number of threads.

    Args:
        x: (B, C, H, W), float32, bfloat16, float16 or float64, any strides; what is not dense in channels_last order is
            copied.
        weight, bias: (C,), what the normalized channels are multiplied with, and what is added to them.
        groups: of C / groups channels each, which are normalized together.
        eps: added to the variance.
        backend: ``auto``, ``native`` (on the CPU) or ``reference``, which is there for GPUs.

    Returns:
        A tensor of x's shape and dtype, dense in channels_last order.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run, as ``native`` where a gradient is needed.
    """
    _validate.latents("x", x, "(B, C, H, W)", (4,))
    channels = x.shape[1]
    for name, vector in (("weight", weight), ("bias", bias)):
        _validate.shaped(name, vector, (channels,), "(C,)", x, "x")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups: got {type(groups).__name__}, accepted is a divisor of the {channels} channels")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups: got {groups}, accepted is a divisor of the {channels} channels")
    _validate.number("eps", eps, positive=True)
    chosen = backend_of("group_norm_silu", backend, x, kernels=("native",))
    if chosen == "native" and torch.is_grad_enabled() and any(y.requires_grad for y in (x, weight, bias)):
        if backend == "native":
            raise RuntimeError(
                "backend: 'native' cannot run: it has no gradient, which an input requires; accepted are auto and "
                "reference, or native under torch.no_grad()"
            )
        chosen = "reference"
    if chosen == "reference":
        return reference.group_norm_silu(x, weight, bias, groups, eps)
    return (_op if torch.compiler.is_compiling() else _run)(x, weight, bias, groups, float(eps), chosen)
