"""Access to (B, S, D) tensors row by row, for the kernels that normalize rows."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ._common import rounded


class Rows(NamedTuple):
    """A (B, S, D) tensor whose rows are dense, (B, D), which is the same row for all of a sample, or (D,), for all."""

    data: Tensor
    batch_stride: int
    row_stride: int


def rows(x: Tensor | None) -> Rows | None:
    """Rows of a tensor that may be missing: None, or one without elements."""
    if x is None or not x.numel():
        return None
    batch_stride, row_stride = (*x.stride()[:-1], 0, 0)[:2]
    return Rows(x, batch_stride, row_stride)


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
def store_row(tensor, sample, position, lane, inside, value):
    start = sample * tensor.batch_stride + position * tensor.row_stride
    tl.store(tensor.data + start + lane, rounded(value, tensor.data.dtype.element_ty), inside)
