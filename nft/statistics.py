"""What comparisons of runs and of checkpoints have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for as many tests, by Holm (Scandinavian Journal of Statistics 6, 1979); NaN is no test."""
    adjusted = np.full(len(p), math.nan)
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    steps = np.asarray(p)[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()
