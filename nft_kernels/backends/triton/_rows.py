"""Access to (B, S, D) tensors row by row, for the kernels that normalize rows."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A (B, S, D) tensor whose rows are dense, or (B, D), which is the same row for all of a sample."""

    data: Tensor
    batch_stride: int
    row_stride: int


def rows(x: Tensor | None) -> Rows | None:
    """Rows of a tensor that may be missing: None, or one without elements."""
    if x is None or not x.numel():
        return None
    return Rows(x, x.stride(0), x.stride(1) if x.ndim == 3 else 0)


def warps(elements: int) -> int:
    """Warps of a program that holds this many elements of each of its tensors: up to 16 elements a thread."""
    return min(max(elements // 512, 4), 16)


@triton.jit
def row_of(length):
    """Sample and position in it of a program that takes one row."""
    program = tl.program_id(0)
    return (program // length).to(tl.int64), (program % length).to(tl.int64)


@triton.jit
def load_row(tensor, sample, position, lane, inside, dtype: tl.constexpr):
    start = sample * tensor.batch_stride + position * tensor.row_stride
    return tl.load(tensor.data + start + lane, inside, other=0).to(dtype)


@triton.jit
def rounded(value, target: tl.constexpr):
    if target != tl.float64:
        # There is no conversion from float64 to bfloat16.
        value = value.to(tl.float32)
    return value.to(target)


@triton.jit
def store_row(tensor, sample, position, lane, inside, value):
    start = sample * tensor.batch_stride + position * tensor.row_stride
    tl.store(tensor.data + start + lane, rounded(value, tensor.data.dtype.element_ty), inside)
