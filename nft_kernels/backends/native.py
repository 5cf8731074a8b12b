"""The C++ backend: describes tensors to nft_kernels._C by pointer, dtype, sizes and strides."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import compute_dtype
from ..reference.nft_loss import PREDICTIONS, WEIGHTINGS, LossInputs, Options
from ..reference.solver_step import Coefficients
from ._compiled import _C, CODES, IMPORT_ERROR
from ._layout import collapse
from ._memory import empty_like

# The loss' gradient is written in the visit that computes the loss.
GRADIENT_AHEAD = True


def isa() -> str:
    """Instruction set in use: the best this processor has, or NFT_KERNELS_ISA."""
    wanted = os.environ.get("NFT_KERNELS_ISA") or _C.isas[-1]
    if wanted not in _C.isas:
        raise ValueError(f"NFT_KERNELS_ISA: got {wanted!r}, accepted are {', '.join(_C.isas)}")
    return wanted


@functools.lru_cache
def _ask_cuda(index: int) -> str | None:
    if torch.version.hip:
        return "it has no kernels for AMD GPUs"
    if not hasattr(_C, "cuda_archs"):
        return "it was built without CUDA"
    # The driver knows best whether one of the images, or the PTX, runs on this GPU.
    reason = _C.cuda_why_not(index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return f"it was built for {_C.cuda_archs} and this GPU is {capability} ({reason})" if reason else None


def _cuda_why_not(index: int) -> str | None:
    return _ask_cuda(index)


# What torch.compiler.assume_constant_result sets, without importing the compiler: it sees through a cache, but not into
# a compiled module.
_cuda_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(x: Tensor) -> str | None:
    """Why this backend cannot take x, or None when it can."""
    if _C is None:
        return f"the compiled module is not installed ({IMPORT_ERROR})"
    if x.is_cpu:
        return None
    kind = x.device.type
    return _cuda_why_not(x.device.index) if kind == "cuda" else f"it has no kernels for {kind} tensors"


def _where(device: torch.device, workspace: Tensor | None = None) -> Any:
    if device.type == "cpu":
        return isa()
    stream = torch.cuda.current_stream(device).cuda_stream
    return device.index, stream, 0 if workspace is None else workspace.data_ptr()


def _workspace(device: torch.device, batch: int) -> Tensor | None:
    if device.type == "cpu":
        return None
    return torch.empty(_C.cuda_workspace_size(batch), dtype=torch.uint8, device=device)


def _describe(x: Tensor | None, packed: bool = False) -> tuple[Any, ...] | None:
    """A (B, ...) tensor as the module takes it; ``packed`` makes it one sample."""
    if x is None:
        return None
    if packed:
        x = x[None]
    # The common layout needs no search, and the small costs before a kernel are a good part of its time.
    sizes, strides = ([x.numel() // x.shape[0]], [1]) if x.is_contiguous() else collapse(x)
    return x.data_ptr(), CODES[x.dtype], x.stride(0), sizes, strides


def _per_sample(x: Tensor | None, constant: float = 0.0) -> tuple[int, int, int] | float:
    return constant if x is None else (x.data_ptr(), CODES[x.dtype], x.stride(0))


def _rows(x: Tensor | None, start: int = 0) -> tuple[int, ...] | None:
    """Of a tensor whose last dimension is dense, from position ``start`` on; None also for one without elements."""
    if x is None or not x.numel():
        return None
    strides = (*x.stride()[:-1], 0, 0, 0)
    return x.data_ptr() + start * strides[1] * x.itemsize, CODES[x.dtype], *strides[:3]


def _many(tensors: Sequence[Tensor], start: int = 0) -> list[tuple[int, ...] | None]:
    return [_rows(x, start) for x in tensors]


def nft_loss(
    inputs: LossInputs, options: Options, *, grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scalar loss, (8, B) per-sample values, and d loss / d v_theta in ``grad_dtype`` if given."""
    v_theta, v_old, x_t, x0, t, r, beta, v_ref, mask, policy_weight, segments, loss_weight = inputs
    dtype = compute_dtype(v_theta, v_old, x_t, x0, v_ref)
    batch, device = t.shape[0], x0.device
    loss, details = torch.empty((), dtype=dtype, device=device), torch.empty(8, batch, dtype=dtype, device=device)
    grad = empty_like(v_theta, grad_dtype) if grad_dtype else None
    workspace = _workspace(device, batch)
    packed = segments is not None
    r_elements = None if r.ndim == 1 else r.expand(x0.shape)
    _C.nft_loss(
        _where(device, workspace),
        _describe(v_theta, packed),
        _describe(v_old, packed),
        _describe(x_t, packed),
        _describe(x0, packed),
        _describe(v_ref, packed),
        _describe(grad, packed),
        _describe(None if mask is None else mask.expand(x0.shape), packed),
        _describe(None if policy_weight is None else policy_weight.expand(x0.shape), packed),
        _describe(r_elements, packed),
        0 if segments is None else segments.data_ptr(),
        _per_sample(t),
        _per_sample(t if r_elements is not None else r),
        _per_sample(beta, options.beta),
        _per_sample(loss_weight, 1 / batch),
        options.adv_clip_max,
        options.kl_weight,
        WEIGHTINGS.index(options.weighting),
        PREDICTIONS.index(options.prediction),
        options.kl_space == "x0",
        options.detach_weight,
        options.channels,
        options.inner,
        dtype == torch.float64,
        batch,
        x0.numel() // x0.shape[0],
        loss.data_ptr(),
        details.data_ptr(),
    )
    return loss, details, grad


def nft_loss_gradient(
    inputs: LossInputs, options: Options, *, details: Tensor, grad_dtype: torch.dtype, grad_loss: Tensor
) -> Tensor:
    """d loss / d v_theta times the scalar ``grad_loss``. The values in ``details`` are computed anew on the way."""
    batch = len(inputs.t)
    loss_weight = grad_loss.double().expand(batch)
    loss_weight = loss_weight / batch if inputs.loss_weight is None else loss_weight * inputs.loss_weight
    grad = nft_loss(inputs._replace(loss_weight=loss_weight), options, grad_dtype=grad_dtype)[2]
    assert grad is not None
    return grad


def scale(grad: Tensor, grad_loss: Tensor) -> None:
    """grad *= grad_loss in place; ``grad`` is dense in memory. A GPU is not asked what ``grad_loss`` is."""
    if grad.is_cpu:
        value = grad_loss.item()
        if value != 1:
            grad.mul_(value)
        return
    elements = grad.numel()
    flat = (grad.data_ptr(), CODES[grad.dtype], 0, [elements], [1])
    _C.cuda_scale(_where(grad.device), flat, elements, grad_loss.dtype == torch.float64, grad_loss.data_ptr())


def add_noise(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    sample: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    wide: Tensor,
) -> None:
    """Write x_t into ``out``, and into ``wide`` unless it is empty; one of ``seed`` and ``noise`` is given."""
    _C.add_noise(
        _where(x0.device),
        _describe(x0),
        _describe(noise),
        _describe(out),
        _describe(wide if wide.numel() else None),
        compute_dtype(x0, noise) == torch.float64,
        x0.shape[0],
        x0.numel() // x0.shape[0],
        _per_sample(t),
        0 if seed is None else seed.data_ptr(),
        0 if sample is None else sample.data_ptr(),
    )


def solver_step(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    noise: Tensor | None,
    history: Sequence[Tensor],
    seed: Tensor | None,
    sample: Tensor | None,
    coefficients: Coefficients,
    out: Tensor,
    h: Tensor,
    x0: Tensor,
    square: Tensor,
) -> None:
    """Write x', and h_0, x - t v and the mean of z^2 per sample into those of ``h``, ``x0``, ``square`` not empty."""
    workspace = _workspace(x.device, len(x)) if square.numel() else None
    _C.solver_step(
        _where(x.device, workspace),
        _describe(x),
        _describe(v),
        _describe(v_uncond),
        _describe(noise),
        [_describe(older) for older in history],
        _describe(out),
        _describe(h if h.numel() else None),
        _describe(x0 if x0.numel() else None),
        compute_dtype(x, v, v_uncond, noise, *history) == torch.float64,
        x.shape[0],
        x.numel() // x.shape[0],
        *coefficients,
        0 if seed is None else seed.data_ptr(),
        0 if sample is None else sample.data_ptr(),
        square.data_ptr() if square.numel() else 0,
    )


def layer_norm_modulate(*args: Any) -> None:
    """``args`` are the tensors from x on, at last h, out and out2, and eps. Writes the last three, but those that are
    empty. Rows are dense."""
    *tensors, eps = args
    _C.layer_norm_modulate(isa(), *map(_rows, tensors), *tensors[0].shape, eps)


def layer_norm_modulate_gradient(*args: Any) -> None:
    """``args`` are the tensors from h on, at last the gradients of x, y and y2, and eps. Writes the last three, but
    those that are empty. Rows are dense."""
    *tensors, eps = args
    _C.layer_norm_modulate_gradient(isa(), *map(_rows, tensors), *tensors[0].shape, eps)


def qk_norm(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], outputs: Sequence[Tensor], start: int, eps: float
) -> None:
    """Write each of the ``inputs`` (B, S, H, d), normalized with its weight (d,), into its output from position
    ``start`` on; unchanged those beyond the weights."""
    _C.qk_norm(isa(), _many(inputs), _many(weights), [], _many(outputs, start), *inputs[0].shape, eps)


def qk_norm_gradient(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    start: int,
    eps: float,
) -> None:
    """Write the gradient of each of the ``inputs`` into its output, given those of what ``qk_norm`` wrote, in which
    they begin at position ``start``."""
    _C.qk_norm(isa(), _many(inputs), _many(weights), _many(grads, start), _many(outputs), *inputs[0].shape, eps)


def gelu(x: Tensor, grad: Tensor | None, out: Tensor) -> None:
    """Write GELU(x) in the tanh form, or given the gradient of that, the gradient of x. All are dense."""
    _C.gelu(isa(), *(None if y is None else (y.data_ptr(), CODES[y.dtype], 0, 1, 0) for y in (x, grad, out)), x.numel())


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, groups: int, eps: float) -> None:
    """Write silu(group_norm(x)) of pictures (B, H, W, C), which are dense."""
    elements, channels = x.numel() // x.shape[0], x.shape[3]
    _C.group_norm_silu(
        isa(),
        _describe(x),
        _per_sample(weight),
        _per_sample(bias),
        _describe(out),
        x.shape[0],
        elements,
        channels,
        groups,
        eps,
    )


def _heads(x: Tensor) -> tuple[Any, ...]:
    """A (B, S, H, d) tensor as the attention takes it."""
    return x.data_ptr(), CODES[x.dtype], x.stride(0), list(x.shape[1:]), list(x.stride()[1:])


def attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """softmax(q k^T / sqrt(d)) v of float32 tensors on the CPU."""
    _C.attention(isa(), *map(_heads, (q, k, v, out)), q.shape[0])


def attention_gradient(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    """Gradients of the queries, keys and values for that of the output, ``grad``."""
    _C.attention_gradient(isa(), *map(_heads, (q, k, v, grad, grad_q, grad_k, grad_v)), q.shape[0])
