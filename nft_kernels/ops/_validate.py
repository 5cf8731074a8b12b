"""Checks shared by the ops. Values are only looked at on the CPU, where that costs no synchronisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floating(name: str, dtype: torch.dtype) -> None:
    """``dtype`` must be one that the kernels take."""
    if dtype not in DTYPES:
        raise TypeError(f"{name}: got {dtype}, accepted are {', '.join(map(str, DTYPES))}")


def _same_device(name: str, x: Tensor, x0: Tensor, model: str = "x0") -> None:
    if x.device != x0.device:
        raise ValueError(f"{name}: got device {x.device}, accepted is the device of {model}, {x0.device}")


def tensor_like(name: str, x: Tensor, x0: Tensor, model: str = "x0") -> None:
    """``x`` must be a floating tensor of the shape and device of x0, the argument called ``model``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, accepted is a tensor")
    floating(name, x.dtype)
    if x.shape != x0.shape:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is the shape of {model}, {tuple(x0.shape)}")
    _same_device(name, x, x0, model)


def latents(name: str, x0: Tensor) -> None:
    """``x0`` must be (B, ...) with at least one element."""
    tensor_like(name, x0, x0)
    if x0.ndim == 0 or x0.numel() == 0:
        raise ValueError(f"{name}: got shape {tuple(x0.shape)}, accepted is (B, ...) with at least one element")


def per_sample(name: str, x: Tensor, x0: Tensor, low: float, high: float) -> None:
    """``x`` must be floating, of shape (B,), on x0's device and, on the CPU, within [low, high]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, accepted is a tensor of shape ({x0.shape[0]},)")
    floating(name, x.dtype)
    if x.shape != x0.shape[:1]:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, accepted is ({x0.shape[0]},), one value per sample")
    _same_device(name, x, x0)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    smallest, largest = (bound.item() for bound in x.detach().aminmax())
    if not (low <= smallest and largest <= high):
        raise ValueError(f"{name}: got values outside [{low:g}, {high:g}] or NaN, accepted is [{low:g}, {high:g}]")


def number(name: str, value: float, *, positive: bool) -> None:
    """``value`` must be a finite number, above zero or at least zero."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {type(value).__name__}, accepted is a number")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name}: got {value}, accepted is a finite number {'above' if positive else 'of at least'} 0")


def seeds(seed: int | Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Philox key and sample word of every sample: an int seeds the whole batch, a tensor every sample on its own."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != x0.shape[:1] or seed.device != x0.device:
            raise ValueError(
                f"seed: got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}, "
                f"accepted is an int or an int64 tensor of shape ({x0.shape[0]},) on {x0.device}"
            )
        return seed.contiguous(), torch.zeros_like(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, accepted is an int or an int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, accepted are signed 64-bit integers")
    sample = torch.arange(x0.shape[0], device=x0.device)
    return torch.full_like(sample, seed), sample
