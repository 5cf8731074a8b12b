"""Attention without a mask in the implementation of one's choice, which is asked before it runs and recorded."""

from __future__ import annotations

import importlib
import warnings
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backends import choose
from ..ops import attention as short

_TORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# Module of flash_attn_func, lowest and highest major compute capability, largest head dimension.
_PACKAGES = {
    "flash2": ("flash_attn", 8, 12, 256),
    "flash3": ("flash_attn_interface", 9, 9, 256),
    "flash4": ("flash_attn.cute", 9, 10, 128),
}
# Longest sequence for which auto takes the kernel for short ones: on two cores with AVX2, flash takes 2.2 times as long
# at 36, 1.2 to 1.3 times at 128, and as long at 256.
_SHORT = 128
CHOICES = ("auto", "native", "short", *_TORCH, *_PACKAGES)


def _capability(device: torch.device) -> int:
    """Major compute capability; 0 where there is none."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device)[0] if nvidia else 0


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _selected(*qkv: Tensor) -> SDPBackend | None:
    """What scaled_dot_product_attention would run now; on the CPU it raises where nothing can, on a GPU it warns."""
    try:
        with torch.enable_grad():
            chosen = torch._fused_sdp_choice(*_heads_first(*qkv))
    except RuntimeError:
        return None
    return next((backend for backend in _TORCH.values() if backend.value == chosen), None)


def _package(name: str) -> Any:
    return importlib.import_module(_PACKAGES[name][0]).flash_attn_func


def why_not(name: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why one of ``CHOICES`` other than auto and native cannot take these tensors, or None when it can."""
    if name in _TORCH:
        with warnings.catch_warnings(record=True) as said, sdpa_kernel(_TORCH[name]):
            warnings.simplefilter("always")
            chosen = _selected(q, k, v)
        reasons = "; ".join(str(warning.message).split(" (Triggered")[0] for warning in said)
        return None if chosen is _TORCH[name] else reasons or f"torch has none for such {q.device.type} tensors"
    if name == "short":
        return short.why_not(q)
    module, lowest, highest, largest = _PACKAGES[name]
    try:
        _package(name)
    except (ImportError, AttributeError) as error:
        return f"{module}.flash_attn_func is not installed ({error})"
    if not lowest <= _capability(q.device) <= highest:
        return f"it needs an NVIDIA GPU of compute capability {lowest} to {highest}, the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    return None if q.shape[-1] <= largest else f"it takes heads of up to {largest} dimensions, not {q.shape[-1]}"


def _order(major: int) -> tuple[str, ...]:
    """Fastest first: on an H200 cudnn, flash and efficient took 0.59, 0.81 and 1.83 ms for (24, 1229, 24, 64) in
    bfloat16; of the packages and other GPUs it is what their authors report."""
    newest = {9: ("flash3", "cudnn"), 10: ("flash4", "cudnn")}.get(major, ())
    return (*newest, "flash2", "flash", "cudnn", "efficient", "math")


def select(choice: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """Name of the implementation that ``attend`` is to run for queries, keys and values of this shape (B, S, H, d),
    with a gradient or without: policies that are compared should differ by their weights alone.

    Raises:
        RuntimeError: an explicit choice that cannot run, with the reason.
    """
    with torch.inference_mode(False):
        q, k, v = (torch.empty(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    if choice == "native":
        chosen = _selected(q, k, v)
        return next((name for name, backend in _TORCH.items() if backend is chosen), "math")
    if choice == "auto":
        # A CPU's kernels are chosen as those of the other ops.
        first = ("short",) if q.is_cpu and shape[1] <= _SHORT and choose("auto", q) == "native" else ()
        names = (*first, *_order(_capability(q.device)))
        return next((name for name in names if why_not(name, q, k, v) is None), "math")
    reason = why_not(choice, q, k, v)
    if reason is not None:
        raise RuntimeError(f"attention: {choice!r} cannot run for {dtype} of shape {tuple(shape)}: {reason}")
    return choice


# What torch.compiler.assume_constant_result sets, without importing the compiler: the choice is made while it looks.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def attend(name: str, q: Tensor, k: Tensor, v: Tensor, *, force: bool = True) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, S, H, d) by the implementation that ``select`` named. To
    ``force`` one leaves all threads no other meanwhile, and is not needed for what torch takes itself."""
    if name in _PACKAGES:
        out = _package(name)(q, k, v)
        # Some versions also return the logarithms of the sums.
        return out[0] if isinstance(out, tuple) else out
    if name == "short":
        return short.attention(q, k, v, backend="native")
    with sdpa_kernel(_TORCH[name]) if force else nullcontext():
        return F.scaled_dot_product_attention(*_heads_first(q, k, v)).transpose(1, 2)
