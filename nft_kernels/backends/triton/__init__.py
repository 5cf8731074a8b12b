"""The Triton backend, one file per op. Needs only the ``triton`` package, which torch's GPU wheels bring."""

from __future__ import annotations

import functools

from torch import Tensor

_PROBLEM = None
try:
    import triton
except ImportError as error:
    _PROBLEM = f"triton is not installed ({error})"
else:
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        _PROBLEM = f"triton {triton.__version__} is older than 3.4"
    else:
        from ._common import INTERPRETED
        from .add_noise import add_noise
        from .layer_norm_modulate import layer_norm_modulate, layer_norm_modulate_gradient
        from .nft_loss import nft_loss, nft_loss_gradient
        from .qk_norm import qk_norm, qk_norm_gradient
        from .quantize_rows import quantize_rows
        from .solver_step import solver_step

# The backward computes the loss' gradient, and holds no buffer until then.
GRADIENT_AHEAD = False

__all__ = [
    "GRADIENT_AHEAD",
    "add_noise",
    "layer_norm_modulate",
    "layer_norm_modulate_gradient",
    "nft_loss",
    "nft_loss_gradient",
    "qk_norm",
    "qk_norm_gradient",
    "quantize_rows",
    "solver_step",
    "why_not",
]


@functools.cache
def _no_driver() -> str | None:
    """Why Triton cannot launch on the GPU: it compiles its driver the first time that it is asked for."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"triton cannot launch: {type(error).__name__}: {error}"
    return None


_no_driver._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(x: Tensor) -> str | None:
    """Why this backend cannot take x, or None when it can."""
    if _PROBLEM is not None:
        return _PROBLEM
    device = x.device.type
    if device == "cpu" and not INTERPRETED:
        return "CPU tensors need TRITON_INTERPRET=1, set before the backend is first used"
    if device == "cuda":
        return _no_driver()
    return None if device == "cpu" else f"it has no kernels for {device} tensors"
