"""One row of a solver's table in plain PyTorch: x' = a x + sum_j b_j h_j + c z with h_0 = p x + q v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from . import compute_dtype


class Coefficients(NamedTuple):
    """The numbers of one row, in the order in which the kernels take them."""

    a: float
    b: Sequence[float]
    c: float
    p: float
    q: float
    t: float
    guidance: float


def solver_step(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    noise: Tensor | None,
    history: Sequence[Tensor],
    coefficients: Coefficients,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x', h_0, x - t v, and the mean of z^2 over each sample's elements, (B,), where there is noise.

    ``history`` holds h_1, h_2, ...; ``v_uncond`` makes v = v_uncond + guidance (v - v_uncond). Computes in float64 if
    any tensor is float64, else in float32.
    """
    a, b, c, p, q, t, guidance = coefficients
    dtype = compute_dtype(x, v, v_uncond, noise, *history)
    x, v = x.to(dtype), v.to(dtype)
    if v_uncond is not None:
        v_uncond = v_uncond.to(dtype)
        v = v_uncond + guidance * (v - v_uncond)
    h = p * x + q * v
    out = a * x + b[0] * h
    # A row may use less of the history than is kept for the rows after it.
    for weight, older in zip(b[1:], history, strict=False):
        out = out + weight * older.to(dtype)
    square = None
    if noise is not None:
        z = noise.to(dtype)
        out = out + c * z
        square = z.reshape(len(z), -1).square().mean(1)
    return out, h, x - t * v, square
