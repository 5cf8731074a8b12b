"""Memory for large results on the CPU, used again when the caller has let go of it (csrc/cpu/memory.h).

The C library gives a large block back to the system once it is freed. The next call then pays a page fault for every
4 KiB, or for the zeroing of a huge page, before a kernel can write: of a gradient of 32 MiB that took two thirds of the
time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ._compiled import _C, CODES

_SMALLEST = 2**20  # bytes; the C library keeps what is smaller


def release() -> None:
    """Give the free memory back to the system."""
    if _C is not None:
        _C.release_memory()


def sizes() -> tuple[int, int]:
    """Bytes in use, and bytes kept for later, 256 MiB at most."""
    return (0, 0) if _C is None else _C.memory_sizes()


def _used_again(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    # torch.compile traces with tensors of other types, and torch.func with what has no memory.
    plain = type(x) is Tensor and x.is_cpu and _C is not None and not torch._C._are_functorch_transforms_active()
    if not plain or math.prod(shape) * dtype.itemsize < _SMALLEST:
        return None
    return from_dlpack(_C.lend_memory(shape, CODES[dtype]))


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like``, in the memory of an earlier large result on the CPU where nobody holds that any more. Such
    a result's storage cannot be resized."""
    out = _used_again(x, x.shape, dtype or x.dtype) if x.is_contiguous() else None
    return torch.empty_like(x, dtype=dtype) if out is None else out


def new_empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.new_empty``, as ``empty_like``."""
    out = _used_again(x, shape, x.dtype)
    return x.new_empty(shape) if out is None else out
