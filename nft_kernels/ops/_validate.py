"""Checks shared by the ops. Values are only looked at on the CPU, where that costs no synchronisation."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_FEW = 256
# Here, as the compiler of torch 2.6 cannot look into sys.float_info.
_LARGEST = sys.float_info.max
# Classes, and not those of ``numbers``, which the compiler does not know a variable by.
WHOLE = (int, np.integer)
_NUMBERS = (*WHOLE, float, np.floating)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, dtype: torch.dtype) -> None:
    """``dtype`` must be one that the kernels take."""
    if dtype not in DTYPES:
        raise TypeError(f"{name}: got {dtype}, accepted are {', '.join(map(str, DTYPES))}")


def same_device(name: str, x: Tensor, x0: Tensor, like: str = "x0") -> None:
    if x.device != x0.device:
        raise ValueError(f"{name}: got device {x.device}, accepted is the device of {like}, {x0.device}")


def tensor(name: str, x: object, accepted: str = "a tensor") -> None:
    """``x`` must be a tensor with memory of its own: kernels take its address."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, accepted is {accepted}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"a tensor of layout {x.layout}"
        raise TypeError(f"{name}: got {kind}, accepted is a dense one")
    if type(x) is Tensor or torch.compiler.is_compiling():
        return
    if is_traceable_wrapper_subclass(x) or isinstance(x, FakeTensor):
        raise TypeError(
            f"{name}: got a {type(x).__name__}, accepted is a plain tensor, such as to_local() of a distributed one"
        )


def shaped(name: str, x: Tensor | None, shape: Sequence[int], described: str, x0: Tensor, like: str) -> None:
    """``x`` must be a floating tensor of ``shape``, which is ``described``, on the device of x0, the argument called
    ``like``."""
    tensor(name, x)
    assert x is not None
    floating(name, x.dtype)
    if x.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is {described} = {tuple(shape)}")
    same_device(name, x, x0, like)


def tensor_like(name: str, x: Tensor, x0: Tensor, like: str = "x0") -> None:
    """``x`` must be a floating tensor of the shape and device of x0, the argument called ``like``."""
    shaped(name, x, x0.shape, f"the shape of {like}", x0, like)


def latents(name: str, x0: Tensor, described: str = "(B, ...)", ndims: Sequence[int] = ()) -> None:
    """``x0`` must be floating, of a shape that is ``described``, and have at least one element and, if they are given,
    so many dimensions."""
    tensor(name, x0)
    floating(name, x0.dtype)
    if x0.ndim == 0 or x0.numel() == 0 or (ndims and x0.ndim not in ndims):
        raise ValueError(f"{name}: got shape {tuple(x0.shape)}, accepted is {described} with at least one element")


def both_or_neither(names: str, one: object, other: object) -> None:
    """Of two arguments either both must be given or none."""
    if (one is None) != (other is None):
        raise ValueError(f"{names}: got one of them, accepted are both or neither")


def _within(name: str, x: Tensor, low: float, high: float, above: bool = False, below: bool = False) -> None:
    # Under vmap, alone or within another of functorch's transforms, there are no values to look at.
    if not x.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    # A few values are read faster than an operator is called. Python's min and max may pass over a NaN, a sum does not.
    few = x.ndim == 1 and x.shape[0] <= _FEW
    values = x.tolist() if few else [bound.item() for bound in x.detach().aminmax()]
    smallest, largest = min(values), max(values)
    inside = low <= smallest and largest <= high and not math.isnan(sum(values))
    if not inside or (above and smallest == low) or (below and largest == high):
        accepted = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ValueError(
            f"{name}: got values outside {accepted} or NaN, {smallest:g} to {largest:g}, accepted is {accepted}"
        )


def per_sample(
    name: str,
    x: Tensor,
    x0: Tensor,
    low: float,
    high: float,
    *,
    above: bool = False,
    below: bool = False,
    otherwise: str = "",
) -> None:
    """``x`` must be floating, of shape (B,), on x0's device and, on the CPU, within [low, high]; ``above`` and
    ``below`` leave out the bound itself; ``otherwise`` is what else the caller takes."""
    # The compiler would take a size in a text for a constant.
    tensor(name, x, "a tensor of shape (B,)")
    floating(name, x.dtype)
    if x.shape != x0.shape[:1]:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, accepted is ({x0.shape[0]},), one value per sample{otherwise}"
        )
    same_device(name, x, x0)
    _within(name, x, low, high, above, below)


def broadcastable(name: str, x: Tensor, x0: Tensor, low: float, high: float) -> None:
    """``x`` must be floating or boolean, broadcast to x0's shape, and, on the CPU, lie within [low, high]."""
    tensor(name, x, "a tensor that broadcasts to x0's shape")
    if x.dtype not in (torch.bool, *DTYPES):
        raise TypeError(f"{name}: got {x.dtype}, accepted are torch.bool, {', '.join(map(str, DTYPES))}")
    shape = (1,) * (x0.ndim - x.ndim) + tuple(x.shape)
    if len(shape) != x0.ndim or any(a not in (1, b) for a, b in zip(shape, x0.shape, strict=True)):
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is one that broadcasts to {tuple(x0.shape)}")
    same_device(name, x, x0)
    if x.dtype != torch.bool:
        _within(name, x, low, high, below=math.isinf(high))


def choice(name: str, value: str, accepted: Sequence[str]) -> None:
    """``value`` must be one of a few names."""
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name}: got {value!r}, accepted are {', '.join(accepted)}")


def offsets(name: str, x: Tensor, x0: Tensor) -> None:
    """``x`` must be (S + 1,) int64 and, on the CPU, rise from 0 to the length of x0."""
    tensor(name, x, "an int64 tensor of offsets")
    if x.dtype != torch.int64:
        raise TypeError(f"{name}: got {x.dtype}, accepted is an int64 tensor of offsets")
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is (S + 1,) for S segments")
    same_device(name, x, x0)
    if not x.is_cpu or torch.compiler.is_compiling():
        return
    if x[0] != 0 or x[-1] != len(x0) or (x.diff() <= 0).any():
        raise ValueError(f"{name}: got offsets {x.tolist()}, accepted are rising ones from 0 to {len(x0)}")


def dimension(name: str, value: int | None, ndim: int = 0) -> int:
    """``value``, counted from the front, must be a dimension other than the first, of so many if that is known."""
    last = f" to {ndim - 1}" if ndim else " on"
    accepted = f"accepted is a dimension from 1{last}, or below 0 counted from the end"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {type(value).__name__}, {accepted}")
    if value == 0 or (ndim and not -ndim < value < ndim):
        raise ValueError(f"{name}: got {value}, {accepted}")
    return value % ndim if ndim else value


def flag(name: str, value: bool) -> None:
    """``value`` must be one of the two."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, accepted are True and False")


def number(name: str, value: float, *, positive: bool) -> None:
    """``value`` must be a finite number, above zero or at least zero."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: got {type(value).__name__}, accepted is a number")
    if isinstance(value, np.generic):
        value = value.item()
    # As comparisons, which the compiler can make of a number that it takes for a variable.
    if not 0 <= value <= _LARGEST or (positive and value == 0):
        raise ValueError(f"{name}: got {value}, accepted is a finite number {'above' if positive else 'of at least'} 0")


def seeds(seed: int | Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Philox key and sample word of every sample: an int seeds the whole batch, a tensor every sample on its own."""
    if isinstance(seed, Tensor):
        tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.shape != x0.shape[:1] or seed.device != x0.device:
            raise ValueError(
                f"seed: got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}, "
                f"accepted is an int or an int64 tensor of shape ({x0.shape[0]},) on {x0.device}"
            )
        return seed.contiguous(), torch.zeros_like(seed)
    if isinstance(seed, bool) or not isinstance(seed, WHOLE):
        raise TypeError(f"seed: got {type(seed).__name__}, accepted is an int or an int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, accepted are signed 64-bit integers")
    sample = torch.arange(x0.shape[0], device=x0.device)
    return torch.full_like(sample, int(seed)), sample
