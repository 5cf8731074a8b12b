"""x_t = (1-t) x0 + t eps, with the noise given or drawn where it is used."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import compute_dtype
from ._common import blocks_of, compute, item_bytes, load, maybe, normals, place, store, tuned, unit, view


@tuned
@triton.jit
def _add_noise(
    x0,
    t,
    noise,
    seed,
    word,
    out,
    wide,
    elements: tl.int64,
    item_bytes: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, start, inside = place(tl.program_id(0), elements, BLOCK)
    if noise is None:
        eps = normals(seed, word, sample, start, BLOCK).to(dtype)
    else:
        eps = load(noise, sample, start, inside, dtype, BLOCK)
    time = unit(t, sample, dtype)
    x_t = (1 - time) * load(x0, sample, start, inside, dtype, BLOCK) + time * eps
    store(out, sample, start, inside, x_t, BLOCK)
    if wide is not None:
        store(wide, sample, start, inside, x_t, BLOCK)


def add_noise(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    sample: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    wide: Tensor,
) -> None:
    """Write x_t into ``out``, and into ``wide`` unless it is empty; one of ``seed`` and ``noise`` is given."""
    with torch.cuda.device_of(x0):
        _add_noise[blocks_of(x0)](
            view(x0),
            view(t),
            maybe(noise),
            seed,
            sample,
            view(out),
            maybe(wide),
            x0.numel() // len(x0),
            item_bytes(x0, noise, out),
            compute(compute_dtype(x0, noise)),
        )
