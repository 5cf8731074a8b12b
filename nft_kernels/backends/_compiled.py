"""The compiled module, where it is installed, and its codes of dtypes."""

from __future__ import annotations

# First, so that the module shares the OpenMP runtime torch has loaded.
import torch

try:
    from .. import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C, IMPORT_ERROR = None, str(error)
else:
    IMPORT_ERROR = ""

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
