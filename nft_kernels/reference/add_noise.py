"""Forward process x_t = (1-t) x0 + t eps with counter-based noise, in plain PyTorch integer arithmetic.

Philox4x32-10 (Salmon et al., SC 2011), keyed by the 64-bit seed; the counter is (element // 4, sample). Two
uniforms (24 high bits + 1/2) / 2^24 make two normals by Box-Muller.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import compute_dtype, unit

_MASK = 0xFFFFFFFF


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x; split in halves because int64 would overflow."""
    upper, lower = (x >> 16) * constant, (x & 0xFFFF) * constant
    middle = (upper & 0xFFFF) + (lower >> 16)
    return (upper >> 16) + (middle >> 16), ((middle & 0xFFFF) << 16) | (lower & 0xFFFF)


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return [c0, c1, c2, c3]


def normals(seed: Tensor, sample: Tensor, elements: int) -> Tensor:
    """Standard normals (B, elements) in float32 for int64 ``seed`` (B,) and ``sample`` (B,)."""
    block = torch.arange((elements + 3) // 4, device=seed.device)[None]
    words = [block & _MASK, block >> 32, sample[:, None] & _MASK, (sample[:, None] >> 32) & _MASK]
    words = [w.expand(len(seed), block.shape[1]) for w in words]
    bits = philox(words, [(seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None]])
    u0, u1, u2, u3 = ((b >> 8).float().add(0.5).mul(2.0**-24) for b in bits)

    def box_muller(radial: Tensor, angular: Tensor) -> list[Tensor]:
        radius, angle = (-2 * radial.log()).sqrt(), 2 * math.pi * angular
        return [radius * angle.cos(), radius * angle.sin()]

    return torch.stack([*box_muller(u0, u1), *box_muller(u2, u3)], -1).flatten(1)[:, :elements]


def add_noise(x0: Tensor, t: Tensor, noise: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(1-t) x0 + t noise for t of shape (B,), in float64 if ``x0`` or ``noise`` is, else in float32."""
    dtype = compute_dtype(x0, noise)
    t = unit(t.to(dtype)).view(-1, *[1] * (x0.ndim - 1))
    return ((1 - t) * x0.to(dtype) + t * noise.to(dtype)).to(out_dtype)
