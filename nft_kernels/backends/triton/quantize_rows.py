"""Rows in float8 with a scale each, and GELU before, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference.quantize_rows import LARGEST
from ._common import INTERPRETED, OPTIONS, next_power_of_2
from ._rows import load_row, row_of, rows, store_row, warps

_INTERPRETED = tl.constexpr(INTERPRETED)
_SHARE = tl.constexpr(1 / LARGEST)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _gelu(x):
    """The tanh form: (1 + tanh(u)) / 2 is the sigmoid of 2 u."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * (x * x * x)))


@triton.jit
def _on_grid(value):
    """Rounded to 4 significant bits or multiples of 2^-9, as float8 has them: half a unit of it is what the last place
    of the sum with a number 2^20 times as large can hold."""
    power = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = 1572864.0 * tl.maximum(power, 0.015625)
    return (value + large) - large


@triton.jit
def _quantize_rows(x, out, scales, length, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    sample, position = row_of(length)
    lane = tl.arange(0, BLOCK)
    inside = lane < width
    value = load_row(x, sample, position, lane, inside, tl.float32)
    if GELU:
        value = _gelu(value)
    # Magnitudes have the order of their bits, where NaN is above all and so not lost.
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
    scale = largest * _SHARE
    scale = tl.where(scale < _TINY, _TINY, scale)
    tl.store(scales + tl.program_id(0), scale)
    value *= tl.div_rn(1.0, scale)
    if _INTERPRETED:
        # The interpreter rounds halves up and drops what carries into the exponent.
        value = _on_grid(value)
    store_row(out, sample, position, lane, inside, value)


def quantize_rows(x: Tensor, out: Tensor, scales: Tensor, gelu: bool) -> None:
    """Write the rows of x (B, S, D), or of its GELU, into ``out`` and what to multiply them with into ``scales``."""
    batch, length, width = x.shape
    block = next_power_of_2(width)
    with torch.cuda.device_of(x):
        _quantize_rows[(batch * length,)](
            rows(x), rows(out), scales, length, width, gelu, block, num_warps=warps(block), **OPTIONS
        )
