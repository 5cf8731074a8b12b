"""Memory layout of tensors as the kernels see it."""

from __future__ import annotations

from torch import Tensor


def collapse(x: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of one sample with neighbouring dimensions joined wherever memory allows."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides
