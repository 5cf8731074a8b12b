"""``nft_loss``: the DiffusionNFT loss with its gradient computed in the forward's visit."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choose, load
from ..reference import compute_dtype
from ..reference import nft_loss as reference
from ..reference.nft_loss import KL_SPACES, PREDICTIONS, WEIGHTINGS, LossInputs, Options
from . import _validate
from ._autograd import refuse_second

REDUCTIONS = ("mean", "sum", "none")
# That the CPU's kernel for weights of tokens holds.
_MOST_CHANNELS = 128


class NFTLossOutput(NamedTuple):
    """Result of ``nft_loss``. Only ``loss`` is differentiable; the others are detached, of shape (B,)."""

    loss: Tensor
    """Scalar: mean policy loss plus kl_weight times mean KL, or what ``reduction`` makes of them."""
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
    """Mean over elements of the squared difference to v_ref, of velocities or as ``kl_space`` says; 0 without v_ref."""
    old_deviation: Tensor
    """Mean over elements of |v_theta - v_old|."""
    old_deviation_max: Tensor
    """Largest |v_theta - v_old|."""


class _Fused(torch.autograd.Function):
    """The inputs are saved beside the gradient: autograd then notices if one is overwritten, and a second backward
    can compute the gradient anew after the first has given its buffer away. A backend computes the gradient ahead
    where it has the inputs at hand anyway, but not in float16: without the loss scale, which only the backward knows,
    it would underflow."""

    @staticmethod
    def forward(
        ctx: Any, v_theta: Tensor, inputs: LossInputs, options: Options, backend: str, want_grad: bool
    ) -> tuple[Tensor, Tensor]:
        kernels, dtype = load(backend), v_theta.dtype
        ahead = want_grad and kernels.GRADIENT_AHEAD and dtype != torch.float16
        loss, details, ctx.grad = kernels.nft_loss(inputs, options, grad_dtype=dtype if ahead else None)
        # Those of inference mode have no version that could be compared.
        ctx.kept = [x if x is not None and x.is_inference() else None for x in inputs]
        ctx.save_for_backward(*(x if kept is None else None for x, kept in zip(inputs, ctx.kept, strict=True)), details)
        ctx.backend, ctx.options = backend, options
        ctx.mark_non_differentiable(details)
        ctx.set_materialize_grads(False)  # no zeros for the details
        return loss, details

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        *saved, details = ctx.saved_tensors
        kernels, grad, ctx.grad = load(ctx.backend), ctx.grad, None
        grad_loss = grad_loss.resolve_neg()
        twice = torch.is_grad_enabled()
        if grad is None or twice:
            inputs = LossInputs._make(x if kept is None else kept for x, kept in zip(saved, ctx.kept, strict=True))
        # A gradient that is to be differentiated in its turn is autograd's, of the reference.
        if twice and not ctx.options.channels:
            loss = reference.nft_loss(inputs, ctx.options)[0].sum()
            return *torch.autograd.grad(loss, inputs.v_theta, grad_loss, create_graph=True), *(None,) * 4
        if grad is None:
            dtype = inputs.v_theta.dtype
            grad = kernels.nft_loss_gradient(
                inputs, ctx.options, details=details, grad_dtype=dtype, grad_loss=grad_loss
            )
        else:
            kernels.scale(grad, grad_loss)
        return refuse_second((grad, None, None, None, None))


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
    beta: Tensor | None,
    v_ref: Tensor | None,
    mask: Tensor | None,
    policy_weight: Tensor | None,
    segments: Tensor | None,
    loss_weight: Tensor | None,
    adv_clip_max: float,
    kl_weight: float,
    weighting: str,
    prediction: str,
    kl_space: str,
    detach_weight: bool,
    constant_beta: float,
    channels: int,
    inner: int,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(
        adv_clip_max, kl_weight, weighting, prediction, kl_space, detach_weight, constant_beta, channels, inner
    )
    inputs = LossInputs(v_theta, v_old, x_t, x0, t, r, beta, v_ref, mask, policy_weight, segments, loss_weight)
    if segments is not None:
        # What torch.compile traced had no values to look at.
        _validate.offsets("segments", segments, x0)
    grad_dtype = _unscaled_dtype(v_theta) if want_grad else None
    _, details, grad = load(backend).nft_loss(inputs, options, grad_dtype=grad_dtype)
    losses = reference.weighted(details[0] + kl_weight * details[5], loss_weight)
    return losses, details[:8], grad if grad is not None else v_theta.new_empty(0)


@_op.register_fake
def _fake(v_theta, v_old, x_t, x0, t, r, beta, v_ref, mask, policy_weight, segments, loss_weight, *options):
    *_, want_grad, _ = options
    details = x0.new_empty((8, t.shape[0]), dtype=compute_dtype(v_theta, v_old, x_t, x0, v_ref))
    grad = torch.empty_like(v_theta, dtype=_unscaled_dtype(v_theta)) if want_grad else v_theta.new_empty(0)
    return details.new_empty(t.shape[0]), details, grad


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    segments = inputs[LossInputs._fields.index("segments")]
    # Detached: a second derivative, which is not there, must not come out as 0.
    ctx.save_for_backward(output[2].detach(), *([] if segments is None else [segments]))
    ctx.dtype, ctx.inputs = inputs[0].dtype, len(inputs)


def _backward(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad, *segments = ctx.saved_tensors
    # In its own dtype: rounded to half precision it would scale a whole sample by that much too much or too little.
    scale = grad_losses
    if segments:
        scale = scale.repeat_interleave(segments[0].diff(), output_size=len(grad))
    scaled = (grad * scale.view(-1, *[1] * (grad.ndim - 1))).to(ctx.dtype)
    return refuse_second((scaled, *[None] * (ctx.inputs - 1)))


_op.register_autograd(_backward, setup_context=_setup_context)


def _run(inputs: LossInputs, options: Options, backend: str, per_sample: bool) -> tuple[Tensor, Tensor]:
    """The loss, a scalar or what every sample adds to it, and the details (8, B)."""
    v_theta, *frozen = inputs
    others = [x if x is None or not x.requires_grad else x.detach() for x in frozen]
    # Kernels read memory, where a lazy negation has not been done. The compiler of torch 2.6 knows no _make.
    inputs = LossInputs(*[x if x is None else x.resolve_neg() for x in (v_theta, *others)])  # type: ignore[arg-type]
    if backend == "reference":
        losses, *rows = reference.nft_loss(inputs, options)
        return losses if per_sample else losses.sum(), torch.stack(rows)
    want_grad = torch.is_grad_enabled() and inputs.v_theta.requires_grad
    if torch.compiler.is_compiling() or per_sample:
        losses, details, _ = _op(*inputs, *options, want_grad, backend)
        return losses if per_sample else losses.sum(), details.detach()
    return _Fused.apply(inputs.v_theta, inputs, options, backend, want_grad)


def _per_token(
    inputs: LossInputs, options: Options, backend: str, per_sample: bool, channel_dim: int
) -> tuple[Tensor, Tensor]:
    """``_run`` with every token as a sample of its own, which counts by its share of its sample's elements."""
    x0 = inputs.x0
    channels, inner = x0.shape[channel_dim], math.prod(x0.shape[channel_dim + 1 :])
    given = (inputs.mask, inputs.policy_weight, inputs.segments)
    common = all(x is None for x in given) and inputs.r.ndim == 1 and options.detach_weight
    if common and inner > 1 and channels <= _MOST_CHANNELS and backend == "native" and x0.is_cpu:
        # Nothing needs to be copied to have the channels last. The compiler of torch 2.6 knows no _replace.
        *others, _, _ = options
        return _run(inputs, Options(*others, channels, inner), backend, per_sample)  # type: ignore[arg-type, call-arg]
    lengths = None if inputs.segments is None else inputs.segments.diff()
    tokens = x0[0].numel() // x0.shape[channel_dim]

    def rows(x: Tensor) -> Tensor:
        return x.expand(x0.shape).movedim(channel_dim, -1).reshape(-1, x0.shape[channel_dim])

    def spread(x: Tensor) -> Tensor:
        if lengths is not None:
            x = x.repeat_interleave(lengths, output_size=len(x0))
        return x.repeat_interleave(tokens)

    def gather(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (len(x0), tokens)).sum(-1)
        if lengths is None:
            return x
        # In a fixed order, which an ``index_add`` on a GPU has not.
        rows_first = x.movedim(-1, 0).contiguous()
        return torch.segment_reduce(rows_first, "sum", lengths=lengths, unsafe=True).movedim(0, -1)

    if inputs.mask is None:
        mask, size = None, torch.full((len(x0) * tokens,), x0.shape[channel_dim], dtype=torch.float64, device=x0.device)
    else:
        mask = rows(inputs.mask)
        size = mask.sum(1, dtype=torch.float64)
    share = size / spread(gather(size).clamp_min(torch.finfo(torch.float64).tiny))
    loss_weight = inputs.loss_weight
    if loss_weight is None:
        loss_weight = torch.full_like(inputs.t, 1 / len(inputs.t), dtype=torch.float64)
    tensors = LossInputs(
        v_theta=rows(inputs.v_theta),
        v_old=rows(inputs.v_old),
        x_t=rows(inputs.x_t),
        x0=rows(x0),
        t=spread(inputs.t),
        r=spread(inputs.r) if inputs.r.ndim == 1 else rows(inputs.r),
        v_ref=None if inputs.v_ref is None else rows(inputs.v_ref),
        beta=None if inputs.beta is None else spread(inputs.beta),
        mask=mask,
        policy_weight=None if inputs.policy_weight is None else rows(inputs.policy_weight),
        segments=None,
        loss_weight=spread(loss_weight) * share,
    )
    loss, details = _run(tensors, options, backend, per_sample)
    details = torch.cat([gather(details[:7] * share.to(details.dtype)), _largest(details[7], lengths, len(x0))[None]])
    return gather(loss) if per_sample else loss, details


def _of_elements(name: str, x: Tensor, x0: Tensor, high: float, wide: bool) -> Tensor:
    """What weighs elements, from 0 to ``high``, in float64 only where the loss is computed in it."""
    _validate.broadcastable(name, x, x0, 0, high)
    return x if x.is_floating_point() and (wide or x.dtype != torch.float64) else x.float()


def _within_reach(segments: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Offsets that lead from 0 to ``length`` whatever they were, and whether they rose so before. A GPU is not asked:
    there a loss of NaN has to tell, and nothing outside the tensors may be touched."""
    right = (segments[0] == 0) & (segments[-1] == length) & (segments.diff() > 0).all()
    inner = segments[1:-1].clamp(0, length).cummax(0).values
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), length)]), right


def _largest(x: Tensor, lengths: Tensor | None, batch: int) -> Tensor:
    x = x.view(batch, -1).amax(1)
    return x if lengths is None else torch.segment_reduce(x, "max", lengths=lengths, unsafe=True)


def check_settings(
    *,
    adv_clip_max: float,
    kl_weight: float,
    weighting: str,
    prediction: str,
    weight_per: str,
    channel_dim: int | None,
    detach_weight: bool,
    kl_space: str,
    reduction: str,
) -> None:
    """What can be said of the loss' settings without its tensors.

    Raises:
        ValueError, TypeError: as ``nft_loss``.
    """
    _validate.choice("weighting", weighting, WEIGHTINGS)
    _validate.choice("prediction", prediction, PREDICTIONS)
    _validate.choice("kl_space", kl_space, KL_SPACES)
    _validate.choice("weight_per", weight_per, ("sample", "token"))
    _validate.choice("reduction", reduction, REDUCTIONS)
    _validate.number("adv_clip_max", adv_clip_max, positive=True)
    _validate.number("kl_weight", kl_weight, positive=False)
    _validate.flag("detach_weight", detach_weight)
    if weighting != "adaptive" and (weight_per != "sample" or not detach_weight):
        raise ValueError(
            f"weighting: got {weighting!r} with weight_per={weight_per!r} and detach_weight={detach_weight}, accepted "
            "is 'adaptive', as there is no weight w otherwise"
        )
    if weight_per == "token":
        _validate.dimension("channel_dim", channel_dim)
    elif channel_dim is not None:
        raise ValueError(f"channel_dim: got {channel_dim} with weight_per='sample', accepted is None")


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
    prediction: str = "v",
    mask: Tensor | None = None,
    policy_weight: Tensor | None = None,
    segments: Tensor | None = None,
    weight_per: str = "sample",
    channel_dim: int | None = None,
    detach_weight: bool = True,
    kl_space: str = "v",
    sample_weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> NFTLossOutput:
    """The DiffusionNFT loss (arXiv 2509.16117, section 3), differentiable with respect to ``v_theta`` alone: once, and
    the mean or sum outside of torch.compile any number of times, by the reference from the second on, but for a weight
    per token without copies (see ``channel_dim``).

    loss = mean_i M (r_i l+_i + (1-r_i) l-_i) / beta_i + kl_weight mean_i mean_elements (v_theta - v_ref)^2 with
    l+- = mean_elements(e+-^2) / w+- and e+- = x_t - t v+- - x0.

    Args:
        v_theta: velocity of the trained model, (B, ...). All tensors of this shape may be float32, bfloat16,
            float16 or float64 in any mix and have any strides.
        v_old: velocity of the old policy.
        x_t: noised latents that the models saw, before any rounding by autocast.
        x0: clean latents.
        t: (B,) times in [0, 1], 1 being noise: a thousandth of a diffusers scheduler's timesteps.
        r: (B,) optimality probabilities in [0, 1], or a tensor with as many dimensions as x0 that broadcasts to its
            shape: one per token, or one per element.
        v_ref: velocity of the model that the KL term is taken against, be it the reference, the old policy or an
            average; without it no KL work is done.
        beta: strength of the implicit policies, a positive number or a tensor (B,).
        adv_clip_max: M, the bound the advantages were clipped to.
        kl_weight: weight of the KL term; needs ``v_ref`` when above 0.
        weighting: ``adaptive`` divides by w+- = max(mean |e+-|, 1e-5), detached; ``none`` does not; ``t`` and
            ``t2`` multiply mean(e^2) by t and t^2 instead, and ``1/t``, ``1/t2`` and ``(1-t)/t2`` by what their names
            say, for t above 0. As e is t times the velocity's error, the last three weigh that by t, 1 and 1 - t, the
            w(t) of the paper's figure 9.
        prediction: what the models predict, and ``v_theta``, ``v_old`` and ``v_ref`` therefore hold: ``v``, ``x0`` or
            ``eps``. The errors are those of the x0 prediction in any case.
        mask: weights of the elements, at least 0, that broadcast to x0's shape, boolean or floating; all means over
            elements are weighted by them. What lies where the mask is 0 is not looked at.
        policy_weight: weights of the elements in the policy loss alone, beside the mask and of its kinds: w+-, the KL
            term and what is reported of l+- are without them. They are not normalised: with a mean of 1 over a sample
            they keep the size of its loss.
        segments: (S + 1,) int64 offsets into the first dimension of packed sequences of different lengths, from 0 to
            x0.shape[0]. Every segment then is a sample: B is S in all that is said of (B,) here.
        weight_per: ``sample`` takes the mean in w+- over a sample, ``token`` over the channels of each token.
        channel_dim: the dimension of the channels, for ``weight_per="token"``; not the first one, and below 0 counted
            from the end. Unless it is the last one the tensors are copied; ``native`` on the CPU copies them with a
            mask, weights of the policy, segments, an r of elements, ``detach_weight=False`` or more than 128 channels
            only.
        detach_weight: False lets the gradient flow through w+- too.
        kl_space: ``v`` takes the KL term's difference between velocities, ``x0`` between x0 predictions.
        sample_weight: (B,) weights of at least 0, by which ``mean`` averages and the others multiply.
        reduction: ``mean``, ``sum``, or ``none`` for a loss of shape (B,).
        backend: ``auto``, ``native``, ``triton`` or ``reference``.

    Returns:
        ``NFTLossOutput`` in float32, or float64 if any input is.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted. Ranges of tensors are
            checked on the CPU only and not within torch.compile, as a GPU would have to synchronise; there the loss is
            NaN for t and (B,) r beyond [0, 1] and, on a GPU, for offsets that do not rise from 0 to x0.shape[0].
        RuntimeError: an explicit backend that cannot run.
    """
    _validate.latents("x0", x0)
    for name, x in (("v_theta", v_theta), ("v_old", v_old), ("x_t", x_t)):
        _validate.tensor_like(name, x, x0)
    if v_ref is not None:
        _validate.tensor_like("v_ref", v_ref, x0)
    check_settings(
        adv_clip_max=adv_clip_max,
        kl_weight=kl_weight,
        weighting=weighting,
        prediction=prediction,
        weight_per=weight_per,
        channel_dim=channel_dim,
        detach_weight=detach_weight,
        kl_space=kl_space,
        reduction=reduction,
    )
    if kl_weight > 0 and v_ref is None:
        raise ValueError(f"v_ref: got None with kl_weight={kl_weight}, accepted is a tensor of shape {tuple(x0.shape)}")
    samples, right, wide = x0, None, compute_dtype(v_theta, v_old, x_t, x0, v_ref) == torch.float64
    if segments is not None:
        _validate.offsets("segments", segments, x0)
        samples = segments[1:]
        segments, right = _within_reach(segments, len(x0)) if segments.is_cuda else (segments.contiguous(), None)
    # At an end the x0 prediction, or the velocity that the KL term needs, may not follow from what is predicted.
    positive = ((prediction, kl_space) == ("x0", "v") and v_ref is not None) or "/" in weighting
    if not wide and isinstance(t, Tensor) and t.dtype == torch.float64:
        # In what the loss is computed in, a time beside an end may be the end.
        t = t.float()
    _validate.per_sample("t", t, samples, 0, 1, above=positive, below=prediction == "eps")
    if isinstance(r, Tensor) and r.ndim == x0.ndim > 1:
        r = _of_elements("r", r, x0, 1, wide)
    else:
        otherwise = f", or {x0.ndim} dimensions that broadcast to x0's" if x0.ndim > 1 else ""
        _validate.per_sample("r", r, samples, 0, 1, otherwise=otherwise)
    constant_beta, betas = 1.0, None
    if isinstance(beta, Tensor):
        _validate.per_sample("beta", beta, samples, 0, math.inf, above=True, below=True)
        betas = beta
    else:
        _validate.number("beta", beta, positive=True)
        constant_beta = float(beta)
    if mask is not None:
        mask = _of_elements("mask", mask, x0, math.inf, wide)
    if policy_weight is not None:
        policy_weight = _of_elements("policy_weight", policy_weight, x0, math.inf, wide)
    loss_weight = None
    if sample_weight is not None:
        _validate.per_sample("sample_weight", sample_weight, samples, 0, math.inf, below=True)
        loss_weight = sample_weight.detach().double()
        if reduction == "mean":
            # Where no sample counts the loss is 0.
            loss_weight = loss_weight / loss_weight.sum().clamp_min(torch.finfo(torch.float64).tiny)
    elif reduction != "mean":
        loss_weight = torch.ones(samples.shape[:1], dtype=torch.float64, device=x0.device)
    if right is not None:
        equal = torch.full(samples.shape[:1], 1 / len(samples), dtype=torch.float64, device=x0.device)
        loss_weight = (equal if loss_weight is None else loss_weight).where(right, math.nan)
    options = Options(
        float(adv_clip_max), float(kl_weight), weighting, prediction, kl_space, detach_weight, constant_beta
    )
    inputs = LossInputs(v_theta, v_old, x_t, x0, t, r, betas, v_ref, mask, policy_weight, segments, loss_weight)
    chosen = choose(backend, x0)
    if weight_per == "token":
        channels = _validate.dimension("channel_dim", channel_dim, x0.ndim)
        loss, details = _per_token(inputs, options, chosen, reduction == "none", channels)
    else:
        loss, details = _run(inputs, options, chosen, reduction == "none")
    return NFTLossOutput(loss, *details.unbind()[:8])
