"""``nft_loss``: the DiffusionNFT loss with its gradient computed in the forward's visit."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose, load
from ..reference import compute_dtype
from ..reference import nft_loss as reference
from ..reference.nft_loss import WEIGHTINGS
from . import _validate


class NFTLossOutput(NamedTuple):
    """Result of ``nft_loss``. Only ``loss`` is differentiable; the others are detached, of shape (B,)."""

    loss: Tensor
    """Scalar: mean policy loss plus kl_weight times mean KL."""
    policy_loss: Tensor
    """M (r l+ + (1-r) l-) / beta."""
    positive_loss: Tensor
    """l+, the loss of v+."""
    negative_loss: Tensor
    """l-, the loss of v-."""
    positive_weight: Tensor
    """w+, the divisor of l+ (1 unless the weighting is adaptive)."""
    negative_weight: Tensor
    """w-, the divisor of l-."""
    kl: Tensor
    """Mean over elements of (v_theta - v_ref)^2; 0 without v_ref."""
    old_deviation: Tensor
    """Mean over elements of |v_theta - v_old|."""
    old_deviation_max: Tensor
    """Largest |v_theta - v_old|."""


class _Fused(torch.autograd.Function):
    """The inputs are saved beside the gradient: autograd then notices if one is overwritten, and a second backward
    can compute the gradient anew after the first has given its buffer away. On the CPU the gradient is computed ahead,
    while a sample is still in cache, but not in float16: it would underflow without the loss scale, which only the
    backward knows. Elsewhere the backward computes it, and neither reads the scale on the host nor holds a buffer."""

    @staticmethod
    def forward(ctx: Any, backend: str, want_grad: bool, *args: Any) -> tuple[Tensor, Tensor]:
        v_theta = args[0]
        ahead = want_grad and backend == "native" and v_theta.dtype != torch.float16
        loss, details, ctx.grad = load(backend).nft_loss(*args, grad_dtype=v_theta.dtype if ahead else None)
        ctx.save_for_backward(*args[:8], details)
        ctx.backend, ctx.options = backend, args[8:]
        ctx.mark_non_differentiable(details)
        return loss, details

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *saved, details = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            options = {"details": details, "grad_dtype": saved[0].dtype, "scale": grad_loss}
            grad = load(ctx.backend).nft_loss_gradient(*saved, *ctx.options, **options)
        else:
            load(ctx.backend).scale(grad, grad_loss)
        return (None, None, grad, *[None] * 10)


def _unscaled_dtype(v_theta: Tensor) -> torch.dtype:
    return torch.float32 if v_theta.dtype == torch.float16 else v_theta.dtype


@torch.library.custom_op("nft_kernels::nft_loss", mutates_args=())
def _op(
    v_theta: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    v_ref: Tensor | None,
    beta: Tensor,
    adv_clip_max: float,
    kl_weight: float,
    weighting: str,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss, details, grad = load(backend).nft_loss(
        v_theta,
        v_old,
        x_t,
        x0,
        t,
        r,
        v_ref,
        beta,
        adv_clip_max,
        kl_weight,
        weighting,
        grad_dtype=_unscaled_dtype(v_theta) if want_grad else None,
    )
    return loss, details, grad if grad is not None else v_theta.new_empty(0)


@_op.register_fake
def _fake(v_theta, v_old, x_t, x0, t, r, v_ref, beta, adv_clip_max, kl_weight, weighting, want_grad, backend):
    out = x0.new_empty((8, x0.shape[0]), dtype=compute_dtype(v_theta, v_old, x_t, x0, v_ref))
    return (
        out.new_empty(()),
        out,
        torch.empty_like(v_theta, dtype=_unscaled_dtype(v_theta)) if want_grad else v_theta.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[2])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (grad,) = ctx.saved_tensors
    return ((grad * grad_loss.to(grad.dtype)).to(ctx.dtype), *[None] * 12)


_op.register_autograd(_backward, setup_context=_setup_context)


def nft_loss(
    v_theta: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    v_ref: Tensor | None = None,
    beta: float | Tensor = 1.0,
    adv_clip_max: float = 5.0,
    kl_weight: float = 0.0,
    weighting: str = "adaptive",
    backend: str = "auto",
) -> NFTLossOutput:
    """The DiffusionNFT loss (arXiv 2509.16117, section 3), differentiable once with respect to ``v_theta`` alone.

    loss = mean_i M (r_i l+_i + (1-r_i) l-_i) / beta_i + kl_weight mean_i mean_elements (v_theta - v_ref)^2 with
    l+- = mean_elements(e+-^2) / w+- and e+- = x_t - t v+- - x0.

    Args:
        v_theta: velocity of the trained model, (B, ...). All tensors of this shape may be float32, bfloat16,
            float16 or float64 in any mix and have any strides.
        v_old: velocity of the old policy.
        x_t: noised latents that the models saw, before any rounding by autocast.
        x0: clean latents.
        t: (B,) times in [0, 1], 1 being noise.
        r: (B,) optimality probabilities in [0, 1].
        v_ref: velocity of the reference model; without it no KL work is done.
        beta: strength of the implicit policies, a positive number or a tensor (B,).
        adv_clip_max: M, the bound the advantages were clipped to.
        kl_weight: weight of the KL term; needs ``v_ref`` when above 0.
        weighting: ``adaptive`` divides by w+- = max(mean |e+-|, 1e-5), detached; ``none`` does not; ``t`` and
            ``t2`` multiply mean(e^2) by t and t^2 instead.
        backend: ``auto``, ``native``, ``triton`` or ``reference``.

    Returns:
        ``NFTLossOutput`` in float32, or float64 if any input is.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted. Ranges of tensors are
            checked on the CPU only, as a GPU would have to synchronise.
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("x0", x0)
    for name, x in (("v_theta", v_theta), ("v_old", v_old), ("x_t", x_t)):
        _validate.tensor_like(name, x, x0)
    if v_ref is not None:
        _validate.tensor_like("v_ref", v_ref, x0)
    _validate.per_sample("t", t, x0, 0, 1)
    _validate.per_sample("r", r, x0, 0, 1)
    _validate.number("adv_clip_max", adv_clip_max, positive=True)
    _validate.number("kl_weight", kl_weight, positive=False)
    if kl_weight > 0 and v_ref is None:
        raise ValueError(f"v_ref: got None with kl_weight={kl_weight}, accepted is a tensor of shape {tuple(x0.shape)}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: got {weighting!r}, accepted are {', '.join(WEIGHTINGS)}")
    if isinstance(beta, Tensor):
        _validate.per_sample("beta", beta, x0, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
    else:
        _validate.number("beta", beta, positive=True)
        beta = torch.full(x0.shape[:1], beta, dtype=torch.float64, device=x0.device)
    others = (x if x is None or not x.requires_grad else x.detach() for x in (v_old, x_t, x0, t, r, v_ref, beta))
    args: tuple[Any, ...] = (v_theta, *others, float(adv_clip_max), float(kl_weight), weighting)
    backend = choose(backend, x0)
    if backend == "reference":
        return NFTLossOutput(*reference.nft_loss(*args))
    want_grad = torch.is_grad_enabled() and v_theta.requires_grad
    if torch.compiler.is_compiling():
        loss, details, _ = _op(*args, want_grad, backend)
        details = details.detach()
    else:
        loss, details = _Fused.apply(backend, want_grad, *args)
    return NFTLossOutput(loss, *details.unbind())
