"""One row of a solver's table, applied in one pass over memory."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import compute_dtype
from ...reference.solver_step import Coefficients
from ._common import (
    blocks_of,
    cdiv,
    compute,
    exact,
    item_bytes,
    load,
    maybe,
    normals,
    number,
    place,
    store,
    tuned,
    view,
)

# Elements per partial sum of z^2, which so does not depend on the size of a block.
_UNIT = tl.constexpr(256)


@tuned
@triton.jit
def _solver_step(
    x,
    v,
    v_uncond,
    noise,
    history,
    seed,
    word,
    a,
    b,
    c,
    p,
    q,
    t,
    guidance,
    out,
    h,
    x0,
    squares,
    elements: tl.int64,
    item_bytes: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, start, inside = place(tl.program_id(0), elements, BLOCK)
    state = load(x, sample, start, inside, dtype, BLOCK)
    velocity = load(v, sample, start, inside, dtype, BLOCK)
    if v_uncond is not None:
        unconditional = load(v_uncond, sample, start, inside, dtype, BLOCK)
        velocity = unconditional + number(guidance, dtype) * (velocity - unconditional)
    newest = number(p, dtype) * state + number(q, dtype) * velocity
    moved = number(a, dtype) * state + number(b[0], dtype) * newest
    if h is not None:
        store(h, sample, start, inside, newest, BLOCK)
    if x0 is not None:
        store(x0, sample, start, inside, state - number(t, dtype) * velocity, BLOCK)
    for j in tl.static_range(len(history)):
        moved += number(b[j + 1], dtype) * load(history[j], sample, start, inside, dtype, BLOCK)
    if seed is not None or noise is not None:
        if noise is not None:
            z = load(noise, sample, start, inside, dtype, BLOCK)
        else:
            z = normals(seed, word, sample, start, BLOCK).to(dtype)
        moved += number(c, dtype) * z
        if squares is not None:
            units = tl.cdiv(elements, _UNIT)
            unit = start // _UNIT + tl.arange(0, BLOCK // _UNIT)
            square = tl.sum(tl.reshape(tl.where(inside, z * z, 0), (BLOCK // _UNIT, _UNIT)), 1)
            tl.store(squares + sample * units + unit, square, unit < units)
    store(out, sample, start, inside, moved, BLOCK)


def solver_step(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    noise: Tensor | None,
    history: Sequence[Tensor],
    seed: Tensor | None,
    sample: Tensor | None,
    coefficients: Coefficients,
    out: Tensor,
    h: Tensor,
    x0: Tensor,
    square: Tensor,
) -> None:
    """Write x', and h_0, x - t v and the mean of z^2 per sample into those of ``h``, ``x0``, ``square`` not empty."""
    a, b, c, p, q, t, guidance = coefficients
    dtype = compute_dtype(x, v, v_uncond, noise, *history)
    used = history[: len(b) - 1]
    elements = x.numel() // len(x)
    squares = x.new_empty((len(x), cdiv(elements, _UNIT.value)), dtype=dtype) if square.numel() else None
    with torch.cuda.device_of(x):
        _solver_step[blocks_of(x)](
            view(x),
            view(v),
            maybe(v_uncond),
            maybe(noise),
            tuple(map(view, used)),
            seed,
            sample,
            exact(a),
            tuple(map(exact, b)),
            *map(exact, (c, p, q, t, guidance)),
            view(out),
            maybe(h),
            maybe(x0),
            squares,
            elements,
            item_bytes(x, v, v_uncond, noise, *used, out),
            compute(dtype),
        )
    if squares is not None:
        torch.sum(squares, 1, dtype=torch.float64, out=square).div_(elements)
