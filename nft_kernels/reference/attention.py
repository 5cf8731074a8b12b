"""Attention without a mask, softmax(q k^T / sqrt(d)) v (Vaswani et al., arXiv 1706.03762)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import compute_dtype


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, H, d) from queries, keys and values of that shape, in the dtype of ``q``."""
    dtype = compute_dtype(q, k, v)
    heads_q, heads_k, heads_v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(heads_q @ heads_k.mT * q.shape[-1] ** -0.5, -1)
    return (weights @ heads_v).transpose(1, 2).to(q.dtype)
