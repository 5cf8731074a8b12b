"""``add_noise``: the forward process x_t = (1-t) x0 + t eps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choose, load
from ..backends._memory import empty_like
from ..reference import add_noise as reference
from ..reference import compute_dtype
from . import _validate


def _outputs(x0: Tensor, noise: Tensor | None, out_dtype: torch.dtype, keep_wide: bool) -> tuple[Tensor, Tensor]:
    """Room for x_t and for its copy in the dtype it is computed in; an empty tensor where that is not wanted."""
    dtype = compute_dtype(x0, noise)
    return empty_like(x0, out_dtype), empty_like(x0, dtype) if keep_wide else x0.new_empty(0, dtype=dtype)


def _run(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    sample: Tensor | None,
    noise: Tensor | None,
    out_dtype: torch.dtype,
    keep_wide: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out, wide = _outputs(x0, noise, out_dtype, keep_wide)
    if backend != "reference":
        load(backend).add_noise(x0, t, seed, sample, noise, out, wide)
        return out, wide
    if noise is None:
        assert seed is not None and sample is not None
        noise = reference.normals(seed, sample, x0[0].numel()).view(x0.shape)
    x_t = reference.add_noise(x0, t, noise, wide.dtype)
    return out.copy_(x_t), wide.copy_(x_t) if keep_wide else wide


_op = torch.library.custom_op("nft_kernels::add_noise", _run, mutates_args=())


@_op.register_fake
def _fake(x0, t, seed, sample, noise, out_dtype, keep_wide, backend):
    return _outputs(x0, noise, out_dtype, keep_wide)


def add_noise(
    x0: Tensor,
    t: Tensor,
    *,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    keep_wide: bool = False,
    backend: str = "auto",
) -> Any:
    """Noise clean latents: x_t = (1-t) x0 + t eps (rectified flow, t = 1 is noise).

    The result carries no gradient: clean latents are data.

    Args:
        x0: clean latents (B, ...), float32, bfloat16, float16 or float64, any strides.
        t: (B,) times in [0, 1], a thousandth of a diffusers scheduler's timesteps.
        seed: draws eps in the kernel (Philox4x32-10 and Box-Muller). An int seeds the whole batch, with a sample's
            row as its index; an int64 tensor (B,) seeds every sample on its own, independent of the batch it is
            in and of the number of processes.
        noise: eps itself, of x0's shape. Exactly one of ``seed`` and ``noise`` must be given.
        out_dtype: dtype of x_t; that of x0 by default.
        keep_wide: also return x_t in the dtype it is computed in, float32 unless an input is float64: the model is
            given the first, the loss the second.
        backend: ``auto``, ``native``, ``triton`` or ``reference``.

    Returns:
        x_t of x0's shape; with ``keep_wide`` the pair of it and its wide copy.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted. Values of t are looked at
            on the CPU only and not within torch.compile; there x_t is NaN where t is beyond [0, 1].
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("x0", x0)
    _validate.per_sample("t", t, x0, 0, 1)
    if (seed is None) == (noise is None):
        raise ValueError("seed, noise: got both or neither, accepted is exactly one of them")
    out_dtype = x0.dtype if out_dtype is None else out_dtype
    _validate.floating("out_dtype", out_dtype)
    _validate.flag("keep_wide", keep_wide)
    seeds, sample = (None, None) if seed is None else _validate.seeds(seed, x0)
    if noise is not None:
        _validate.tensor_like("noise", noise, x0)
        noise = noise.detach().resolve_neg()
    backend = choose(backend, x0)
    run = _op if torch.compiler.is_compiling() else _run
    x_t, wide = run(
        x0.detach().resolve_neg(), t.detach().resolve_neg(), seeds, sample, noise, out_dtype, keep_wide, backend
    )
    return (x_t, wide) if keep_wide else x_t
