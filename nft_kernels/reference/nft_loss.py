"""The DiffusionNFT loss in plain PyTorch (arXiv 2509.16117, section 3).

The model's output p predicts the velocity v, the clean latents x0 or the noise eps; each is an affine view of the same
x0 prediction x0_hat = keep x_t + push p. With p+ = p_old + beta (p_theta - p_old), p- = p_old - beta (p_theta - p_old)
and e+- = x0_hat(p+-) - x0 (for v the design's x_t - t v+- - x0),

    w+- = max(mean |e+-|, 1e-5)    l+- = mean e+-^2 / w+-    policy = M mean(r e+^2 / w+ + (1-r) e-^2 / w-) / beta

where a mean runs over one sample's elements (or one segment's), weighted by the mask if there is one, and that of the
policy loss also by the policy's weights of elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import compute_dtype, unit

MIN_WEIGHT = 1e-5
WEIGHTINGS = ("adaptive", "none", "t", "t2", "1/t", "1/t2", "(1-t)/t2")
PREDICTIONS = ("v", "x0", "eps")
KL_SPACES = ("v", "x0")


class LossInputs(NamedTuple):
    """The tensors that every backend takes. With ``segments`` there are S samples, of which packed tensors of shape
    (N, ...) hold the rows; else the tensors have shape (B, ...) and S is B."""

    v_theta: Tensor
    v_old: Tensor
    x_t: Tensor
    x0: Tensor
    t: Tensor
    """(S,)"""
    r: Tensor
    """(S,), or with as many dimensions as x0 and broadcasting to its shape."""
    beta: Tensor | None = None
    """(S,); None where all samples have that of the options."""
    v_ref: Tensor | None = None
    mask: Tensor | None = None
    """Weights of the elements that broadcast to x0's shape."""
    policy_weight: Tensor | None = None
    """The same for the policy loss alone, beside the mask."""
    segments: Tensor | None = None
    """(S + 1,) int64 offsets into the first dimension of packed tensors."""
    loss_weight: Tensor | None = None
    """(S,), what a sample counts in the loss; None is 1 / S."""


class Options(NamedTuple):
    """What does not change from sample to sample."""

    adv_clip_max: float = 5.0
    kl_weight: float = 0.0
    weighting: str = "adaptive"
    prediction: str = "v"
    kl_space: str = "v"
    detach_weight: bool = True
    beta: float = 1.0
    channels: int = 0
    """Of a weight per token, for kernels that know one: a token's channels lie ``inner`` elements of a sample apart."""
    inner: int = 1


def time_weighting(t: Tensor, weighting: str) -> Tensor:
    """Per-sample factor of mean(e^2), which is the name itself; 1 for ``adaptive`` and ``none``."""
    factors = {"t": t, "t2": t * t, "1/t": 1 / t, "1/t2": 1 / (t * t), "(1-t)/t2": (1 - t) / (t * t)}
    return factors.get(weighting, torch.ones_like(t))


def x0_coefficients(t: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Per-sample (keep, push) with x0_hat = keep x_t + push p, from x_t = (1-t) x0 + t eps and v = eps - x0."""
    if prediction == "v":
        return torch.ones_like(t), -t
    if prediction == "x0":
        return torch.zeros_like(t), torch.ones_like(t)
    return 1 / (1 - t), -t / (1 - t)


def kl_factor(t: Tensor, prediction: str, space: str) -> Tensor:
    """Per-sample factor that turns mean (p_theta - p_ref)^2 into that of the velocities or the x0 predictions."""
    if prediction == space:
        return torch.ones_like(t)
    factors = {("v", "x0"): t, ("x0", "v"): 1 / t, ("eps", "x0"): t / (1 - t), ("eps", "v"): 1 / (1 - t)}
    return factors[prediction, space].square()


def weighted(losses: Tensor, loss_weight: Tensor | None) -> Tensor:
    """What samples of these losses add to the loss."""
    return losses / len(losses) if loss_weight is None else losses * loss_weight.to(losses.dtype)


def nft_loss(inputs: LossInputs, options: Options) -> tuple[Tensor, ...]:
    """What every sample adds to the loss, and its eight values in the order of ``NFTLossOutput``, (S,) each; only the
    first has a graph. Computes in float64 if any tensor is float64, else in float32.
    """
    v_theta, v_old, x_t, x0, t, r, beta, v_ref, mask, policy_weight, segments, loss_weight = inputs
    dtype = compute_dtype(v_theta, v_old, x_t, x0, v_ref)
    v_theta, v_old, x_t, x0 = (x.to(dtype) for x in (v_theta, v_old, x_t, x0))
    v_old, x_t, x0 = v_old.detach(), x_t.detach(), x0.detach()
    beta = torch.full_like(t, options.beta, dtype=dtype) if beta is None else beta
    t, r, beta = (x.detach().to(dtype) for x in (t, r, beta))
    each_r = r.ndim == x0.ndim > 1
    t, r = unit(t), r if each_r else unit(r)

    def per_element(x: Tensor) -> Tensor:
        if segments is not None:
            x = x.repeat_interleave(segments.diff(), output_size=len(x0))
        return x.view(-1, *[1] * (x0.ndim - 1))

    def total(x: Tensor) -> Tensor:
        rows = x.flatten(1).sum(1) if x.ndim > 1 else x
        if segments is None:
            return rows
        owner = torch.arange(len(t), device=t.device).repeat_interleave(segments.diff(), output_size=len(x0))
        return rows.new_zeros(len(t)).index_add(0, owner, rows)

    weights = torch.ones_like(x0) if mask is None else mask.detach().to(dtype).expand_as(x0)
    v_ref = None if v_ref is None else v_ref.detach().to(dtype)
    if mask is not None:
        # Padding may hold anything, NaN included.
        kept = weights > 0
        v_theta, v_old, x_t, x0 = (torch.where(kept, x, 0) for x in (v_theta, v_old, x_t, x0))
        v_ref = None if v_ref is None else torch.where(kept, v_ref, 0)
    # A sample whose mask is empty counts as nothing, not as NaN.
    size = total(weights).clamp_min(torch.finfo(dtype).tiny)

    def mean(x: Tensor) -> Tensor:
        return total(x if mask is None else x * weights) / size

    keep, push = map(per_element, x0_coefficients(t, options.prediction))
    step = push * per_element(beta) * (v_theta - v_old)
    share = r if each_r else per_element(r)
    of_policy = 1 if policy_weight is None else policy_weight.detach().to(dtype)

    def branch(error: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = torch.ones_like(t)
        if options.weighting == "adaptive":
            weight = mean(error.abs()).clamp_min(MIN_WEIGHT)
            weight = weight.detach() if options.detach_weight else weight
        scale = time_weighting(t, options.weighting) / weight
        return scale * mean(error.square()), weight, scale * mean(of_policy * share * error.square())

    base = keep * x_t - x0 + push * v_old
    positive_loss, positive_weight, positive = branch(base + step, share)
    negative_loss, negative_weight, negative = branch(base - step, 1 - share)
    policy_loss = options.adv_clip_max * (positive + negative) / beta
    loss, kl = policy_loss, torch.zeros_like(t)
    if v_ref is not None:
        kl = kl_factor(t, options.prediction, options.kl_space) * mean((v_theta - v_ref).square())
        loss = policy_loss + options.kl_weight * kl
    deviation = (v_theta - v_old).detach().abs()
    rows = deviation.flatten(1).amax(1) if deviation.ndim > 1 else deviation
    largest = rows if segments is None else torch.segment_reduce(rows, "max", lengths=segments.diff(), unsafe=True)
    details = (
        policy_loss,
        positive_loss,
        negative_loss,
        positive_weight,
        negative_weight,
        kl,
        mean(deviation),
        largest,
    )
    return (weighted(loss, loss_weight), *(x.detach() for x in details))
