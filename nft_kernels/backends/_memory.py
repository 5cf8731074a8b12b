"""Memory for large results on the CPU, used again when the caller has let go of it.

The C library gives a large block back to the system once it is freed. The next call then pays a page fault for every
4 KiB, or for the zeroing of a huge page, before a kernel can write: of a gradient of 32 MiB that took two thirds of the
time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_SMALLEST = 2**20  # bytes; the C library keeps what is smaller
_KEPT = 2**28  # bytes of free memory at most
_free: dict[int, Tensor] = {}  # by address, the oldest first
_lent: dict[int, tuple[weakref.ref[Any], Tensor]] = {}


def release() -> None:
    """Give the free memory back to the system."""
    _free.clear()


def _block(size: int) -> Tensor:
    for address, block in reversed(list(_free.items())):
        # Another thread may have been faster.
        if len(block) == size and _free.pop(address, None) is not None:
            return block
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def _lend(block: Tensor) -> Tensor:
    address, array = block.data_ptr(), block.numpy()

    def take_back(_: Any) -> None:
        _free[address] = _lent.pop(address)[1]
        for oldest in list(_free):
            if sum(map(len, list(_free.values()))) <= _KEPT:
                break
            _free.pop(oldest, None)

    # Whatever shares the memory, be it a tensor, a storage or an array, holds this array.
    _lent[address] = weakref.ref(array, take_back), block
    return torch.from_numpy(array)


def _used_again(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    size = math.prod(shape) * dtype.itemsize
    # torch.compile traces with tensors of other types, and torch.func with what has no memory.
    plain = type(x) is Tensor and x.is_cpu and not torch._C._are_functorch_transforms_active()
    if not plain or size < _SMALLEST:
        return None
    storage = _lend(_block(size)).untyped_storage()
    # Not a view, which autograd would not let a caller change in every way.
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape)  # type: ignore[call-overload]


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like``, in the memory of an earlier large result on the CPU where nobody holds that any more. Such
    a result's storage cannot be resized."""
    out = _used_again(x, x.shape, dtype or x.dtype) if x.is_contiguous() else None
    return torch.empty_like(x, dtype=dtype) if out is None else out


def new_empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    """``x.new_empty``, as ``empty_like``."""
    out = _used_again(x, shape, x.dtype)
    return x.new_empty(shape) if out is None else out
