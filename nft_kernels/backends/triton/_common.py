"""Shared by the kernels: access to tensors of any strides, exact numbers, noise, and the choice of block size."""

import ctypes
import os
import re
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import collapse

INTERPRETED = triton.knobs.runtime.interpret


class View(NamedTuple):
    """A (B, N) view of a tensor: sample b starts b * batch_stride elements in. Without sizes the sample is dense."""

    data: Tensor
    batch_stride: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    end: int = 1
    """Triton makes constants of numbers that are 1, and up to 3.6 loops take those of inner tuples to be None unless
    the outer tuple has a constant of its own after them."""


def view(x: Tensor) -> View:
    sizes, strides = ([], []) if x.is_contiguous() else collapse(x)
    dense = strides in ([], [1])
    return View(x, x.stride(0), () if dense else tuple(sizes), () if dense else tuple(strides))


def maybe(x: Tensor | None) -> View | None:
    """View of a tensor that may be missing: None, or one without elements."""
    return None if x is None or not x.numel() else view(x)


def exact(x: float) -> tuple[float, float, float]:
    """x as a sum of three float32 numbers: Triton passes no wider ones."""
    high = ctypes.c_float(x).value
    middle = ctypes.c_float(x - high).value
    return high, middle, x - high - middle


def compute(dtype: torch.dtype) -> tl.dtype:
    """The kernels' name for the dtype of a computation."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes 5 us on the host in 3.6, as does its ``next_power_of_2``."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# Products round before they are added, as on the CPU. Triton's own choice changes between versions.
OPTIONS = {"enable_fp_fusion": False}


def _config(block: int, num_warps: int) -> triton.Config:
    return triton.Config({"BLOCK": block, **OPTIONS}, num_warps=num_warps)


def _configs() -> list[triton.Config]:
    if wanted := os.environ.get("NFT_KERNELS_TRITON_CONFIG"):
        found = re.fullmatch(r"BLOCK=(\d+),num_warps=(1|2|4|8|16)", wanted)
        block = int(found[1]) if found else 0
        if not found or block < 256 or block & (block - 1):
            raise ValueError(
                f"NFT_KERNELS_TRITON_CONFIG: got {wanted!r}, accepted is such as BLOCK=2048,num_warps=8: a power of "
                "two of at least 256, and 1, 2, 4, 8 or 16 warps"
            )
        return [_config(block, int(found[2]))]
    # First with 8 elements a thread: 16 bytes of a half-precision tensor, the widest access there is.
    candidates = [_config(256 * n * warps, warps) for warps in (4, 8) for n in (1, 2, 4)]
    return candidates if os.environ.get("NFT_KERNELS_AUTOTUNE") == "1" else candidates[:1]


def _allowed(configs: list[triton.Config], *_: Any, **__: Any) -> list[triton.Config]:
    """Nothing can be timed while a CUDA graph is captured."""
    return configs[:1] if torch.cuda.is_current_stream_capturing() else configs


def _clock(call: Any, quantiles: Any) -> Any:
    # Up to 3.6 Triton times a kernel even where there is one choice.
    if torch.cuda.is_current_stream_capturing():
        return [0.0] * len(quantiles)
    return triton.testing.do_bench(call, quantiles=quantiles)


def tuned(kernel: Any) -> Any:
    """Give a kernel its BLOCK, the elements of one sample that it takes at once, and num_warps.

    The default is a fixed choice, so nothing is timed. NFT_KERNELS_TRITON_CONFIG sets another one, and
    NFT_KERNELS_AUTOTUNE=1 times several for every new size of samples or mix of dtypes and keeps the best on disk.
    """
    # What is kept on disk is JSON, so there is no Triton dtype among these.
    key = [name for name in ("elements", "item_bytes", "GENERAL") if name in kernel.arg_names]
    prune = {"early_config_prune": _allowed}
    return triton.autotune(_configs(), key, prune_configs_by=prune, do_bench=_clock, cache_results=True)(kernel)


def item_bytes(*tensors: Tensor | None) -> int:
    """Bytes that one element takes in all tensors, part of a tuned kernel's key."""
    return sum(x.element_size() for x in tensors if x is not None)


def blocks_of(x: Tensor) -> Any:
    """Grid of a kernel with one program for every block of every sample."""
    return lambda config: (len(x) * cdiv(x.numel() // len(x), config["BLOCK"]),)


@triton.jit
def number(parts, dtype: tl.constexpr):
    """What ``exact`` took apart."""
    return (tl.full((), parts[0], dtype) + parts[1]) + parts[2]


@triton.jit
def scalar(vector, sample, dtype: tl.constexpr):
    """One sample's entry of a (B,) tensor."""
    return tl.load(vector.data + sample * vector.batch_stride).to(dtype)


@triton.jit
def unit(vector, sample, dtype: tl.constexpr):
    """``scalar``, but NaN where it is not within [0, 1]: only the result can tell that nobody has looked at."""
    x = scalar(vector, sample, dtype)
    return tl.where((x >= 0) & (x <= 1), x, float("nan"))


@triton.jit
def place(program, elements, BLOCK: tl.constexpr):
    """Sample of a program of ``blocks_of``, the element its block starts at, and which lanes are inside."""
    blocks = tl.cdiv(elements, BLOCK).to(tl.int32)
    start = (program % blocks).to(tl.int64) * BLOCK
    return (program // blocks).to(tl.int64), start, tl.arange(0, BLOCK) < elements - start


@triton.jit
def _digit(start, carry, size):
    """Last digit of start + carry in base ``size``, and what it carries; in 32 bits unless the base is longer."""
    kind: tl.constexpr = tl.int64 if size.dtype == tl.int64 else tl.uint32
    digit = (start % size).to(kind) + carry.to(kind)
    return (digit % size.to(kind)).to(tl.int64), digit // size.to(kind)


@triton.jit
def offsets(view, sample, start, BLOCK: tl.constexpr):
    """Where elements start, start + 1, ... of a sample lie."""
    lane = tl.arange(0, BLOCK)
    offset = sample * view.batch_stride + tl.zeros((BLOCK,), tl.int64)
    if len(view.sizes) == 0:
        offset += start + lane
    else:
        # Long division of ``start`` is for the whole program; lanes only carry into its digits.
        carry = lane
        for d in tl.static_range(len(view.sizes) - 1, 0, -1):
            digit, carry = _digit(start, carry, view.sizes[d])
            offset += digit * view.strides[d]
            start = start // view.sizes[d]
        offset += (start + carry) * view.strides[0]
    return offset


@triton.jit
def load(view, sample, start, inside, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one sample, with zeros outside."""
    return tl.load(view.data + offsets(view, sample, start, BLOCK), inside, other=0).to(dtype)


@triton.jit
def rounded(value, target: tl.constexpr):
    if target != tl.float64:
        # There is no conversion from float64 to bfloat16.
        value = value.to(tl.float32)
    return value.to(target)


@triton.jit
def store(view, sample, start, inside, value, BLOCK: tl.constexpr):
    tl.store(view.data + offsets(view, sample, start, BLOCK), rounded(value, view.data.dtype.element_ty), inside)


@triton.jit
def _philox(key, low, high):
    """Philox4x32-10 (Salmon et al., SC 2011) of the 128-bit counters (low, high), a block of them, under one key."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = low.to(tl.uint32)
    c1 = (low >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + high.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (high >> 32).to(tl.uint32)
    m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, m0)
        high1 = tl.umulhi(c2, m1)
        low0 = c0 * m0
        low1 = c2 * m1
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _uniform(bits):
    return ((bits >> 8).to(tl.float32) + 0.5) * (1.0 / 16777216)


# pi/2 in two parts, the first short enough for its multiples to be exact.
_HALF_PI = tl.constexpr(float.fromhex("0x1.921fap+0"))
_HALF_PI_REST = tl.constexpr(float.fromhex("0x1.54442ep-20"))


@triton.jit
def _cos_sin(angle):
    """Of angles in [0, 2 pi], as in csrc/math.h. Those of the library reduce huge ones, in memory."""
    quarter = (angle * 0.63661977 + 0.5).to(tl.int32)
    count = quarter.to(tl.float32)
    y = (angle - count * _HALF_PI) - count * _HALF_PI_REST
    y2 = y * y
    s = y + y * y2 * (-0.16666655 + y2 * (0.008332177 + y2 * -0.0001951717))
    c = (1.0 - 0.5 * y2) + y2 * y2 * (0.041666646 + y2 * (-0.0013887367 + y2 * 2.4438306e-05))
    odd = (quarter & 1) != 0
    # Signs are numbers, 1 or -1: to choose between values takes more registers.
    cosine = (1 - ((quarter + 1) & 2)).to(tl.float32) * tl.where(odd, s, c)
    return cosine, (1 - (quarter & 2)).to(tl.float32) * tl.where(odd, c, s)


@triton.jit
def _box_muller(radial, angular):
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(radial)))
    angle = 6.283185307179586 * _uniform(angular)
    cosine, sine = _cos_sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, word, sample, start, BLOCK: tl.constexpr):
    """Standard normals for a block of one sample, the same as those of the reference."""
    counter = start // 4 + tl.arange(0, BLOCK // 4)
    c0, c1, c2, c3 = _philox(tl.load(seed + sample), counter, tl.load(word + sample))
    n0, n1 = _box_muller(c0, c1)
    n2, n3 = _box_muller(c2, c3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
