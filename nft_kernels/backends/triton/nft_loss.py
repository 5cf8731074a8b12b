"""The loss in two launches, sums over slices of samples and all that follows from them, and the gradient in a third.

Sums are taken in a fixed order and stay on the device: reruns give the same bits, and a CUDA graph can hold it all.

GENERAL kernels know what the common ones leave out: masks, policy weights, r per element, segments, and gradients
through the weights.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...reference import compute_dtype
from ...reference.nft_loss import MIN_WEIGHT, LossInputs, Options
from ._common import (
    OPTIONS,
    View,
    blocks_of,
    cdiv,
    compute,
    exact,
    item_bytes,
    load,
    maybe,
    next_power_of_2,
    number,
    place,
    scalar,
    store,
    tuned,
    unit,
    view,
)

# As in the CPU kernels.
_FEW = 8
_MIN_WEIGHT = tl.constexpr(MIN_WEIGHT)
# Samples times slices that ``_finish`` takes at once.
CELLS = 1024


@triton.jit
def _divide(a, b):
    """Rounded to nearest, which in float32 the operator is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


class _Views(NamedTuple):
    v_theta: View
    v_old: View
    x_t: View
    x0: View
    t: View
    beta: View | None
    constant_beta: tuple[float, float, float]
    r: View | None
    r_elements: View | None
    v_ref: View | None
    mask: View | None
    policy_weight: View | None
    segments: Tensor | None
    loss_weight: View | None
    end: int = 1
    """As in ``View``."""


@triton.jit
def _affine(t, PREDICTION: tl.constexpr):
    """(keep, push) with x0_hat = keep x_t + push p for what the model predicts, p."""
    one = tl.full(t.shape, 1, t.dtype)
    if PREDICTION == "v":
        return one, -t
    elif PREDICTION == "x0":
        return one - one, one
    else:
        return _divide(one, one - t), _divide(-t, one - t)


@triton.jit
def _kl_factor(t, PREDICTION: tl.constexpr, KL_SPACE: tl.constexpr):
    """Turns a difference of predictions, squared, into that of the velocities or of the x0 predictions."""
    one = tl.full(t.shape, 1, t.dtype)
    if PREDICTION == KL_SPACE:
        factor = one
    elif PREDICTION == "v":
        factor = t
    elif PREDICTION == "x0":
        factor = _divide(one, t)
    elif KL_SPACE == "x0":
        factor = _divide(t, one - t)
    else:
        factor = _divide(one, one - t)
    return factor * factor


@triton.jit
def _beta(inputs, sample, dtype: tl.constexpr):
    if inputs.beta is None:
        return tl.zeros(sample.shape, dtype) + number(inputs.constant_beta, dtype)
    else:
        return scalar(inputs.beta, sample, dtype)


@triton.jit
def _loss_weight(inputs, sample, batch):
    """What a sample counts in the loss."""
    if inputs.loss_weight is None:
        return tl.full(sample.shape, 1, tl.float64) / batch
    else:
        return scalar(inputs.loss_weight, sample, tl.float64)


@triton.jit
def _errors(inputs, sample, row, start, inside, dtype: tl.constexpr, PREDICTION: tl.constexpr, BLOCK: tl.constexpr):
    """p_theta, d = p_theta - p_old, and what the errors e+- = base +- step consist of."""
    p_theta = load(inputs.v_theta, row, start, inside, dtype, BLOCK)
    p_old = load(inputs.v_old, row, start, inside, dtype, BLOCK)
    x_t = load(inputs.x_t, row, start, inside, dtype, BLOCK)
    x0 = load(inputs.x0, row, start, inside, dtype, BLOCK)
    keep, push = _affine(unit(inputs.t, sample, dtype), PREDICTION)
    d = p_theta - p_old
    if PREDICTION != "v":
        x_t = keep * x_t
    return p_theta, d, (x_t - x0) + push * p_old, (push * _beta(inputs, sample, dtype)) * d


@triton.jit
def _mask(inputs, row, start, inside, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """0 outside."""
    if inputs.mask is not None:
        return load(inputs.mask, row, start, inside, dtype, BLOCK)
    else:
        return inside.to(dtype)


@triton.jit
def _shares(inputs, sample, row, start, inside, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """What e+^2 and e-^2 count in the policy loss, without the mask."""
    if inputs.r_elements is not None:
        r = load(inputs.r_elements, row, start, inside, dtype, BLOCK)
    else:
        r = tl.zeros((BLOCK,), dtype) + unit(inputs.r, sample, dtype)
    if inputs.policy_weight is not None:
        policy_weight = load(inputs.policy_weight, row, start, inside, dtype, BLOCK)
        return policy_weight * r, policy_weight * (1 - r)
    else:
        return r, 1 - r


@triton.jit
def _slice(inputs, program, slices, length, elements):
    """Sample of a slice, the row of the tensors that holds it, its first element there, and where it ends."""
    sample = (program // slices).to(tl.int64)
    place_in_sample = (program % slices).to(tl.int64)
    if inputs.segments is None:
        first = place_in_sample * length
        return sample, sample, first, tl.minimum(first + length, elements)
    else:
        # Packed tensors are one row. Only the device knows how long a segment is: all have equally many slices.
        begin = tl.load(inputs.segments + sample) * elements
        end = tl.load(inputs.segments + sample + 1) * elements
        # A multiple of 16, so that wide accesses stay aligned.
        length = tl.cdiv(end - begin, slices * 16) * 16
        first = begin + place_in_sample * length
        return sample, sample * 0, first, tl.minimum(first + length, end)


@triton.jit
def _time_weighting(t, WEIGHTING: tl.constexpr):
    one = tl.full(t.shape, 1, t.dtype)
    if WEIGHTING == "t":
        return t
    elif WEIGHTING == "t2":
        return t * t
    elif WEIGHTING == "1/t":
        return _divide(one, t)
    elif WEIGHTING == "1/t2":
        return _divide(one, t * t)
    elif WEIGHTING == "(1-t)/t2":
        return _divide(one - t, t * t)
    else:
        return one


@triton.jit
def _at_least(bound: tl.constexpr, x):
    """A maximum that keeps NaN."""
    return tl.where(x < bound, tl.full(x.shape, bound, x.dtype), x)


@tuned
@triton.jit
def _sum_slices(
    inputs,
    sums,
    slices: tl.int32,
    length: tl.int64,
    PREDICTION: tl.constexpr,
    GENERAL: tl.constexpr,
    elements: tl.int64,
    item_bytes: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each slice of one sample; ``sums`` is (7, B, slices), or (10, B, slices) if GENERAL."""
    program = tl.program_id(0)
    sample, row, first, end = _slice(inputs, program, slices, length, elements)
    positive_abs = tl.zeros((BLOCK,), dtype)
    negative_abs = tl.zeros((BLOCK,), dtype)
    positive_square = tl.zeros((BLOCK,), dtype)
    negative_square = tl.zeros((BLOCK,), dtype)
    kl = tl.zeros((BLOCK,), dtype)
    deviation = tl.zeros((BLOCK,), dtype)
    largest = tl.zeros((BLOCK,), dtype)
    size = tl.zeros((BLOCK,), dtype)
    positive_share = tl.zeros((BLOCK,), dtype)
    negative_share = tl.zeros((BLOCK,), dtype)
    for start in range(first, end, BLOCK):
        inside = tl.arange(0, BLOCK) < end - start
        v_theta, d, base, step = _errors(inputs, sample, row, start, inside, dtype, PREDICTION, BLOCK)
        positive = base + step
        negative = base - step
        weight = 1
        if GENERAL:
            weight = _mask(inputs, row, start, inside, dtype, BLOCK)
            # Padding may hold anything, NaN included.
            positive = tl.where(weight > 0, positive, 0)
            negative = tl.where(weight > 0, negative, 0)
            d = tl.where(weight > 0, d, 0)
            size += weight
        positive_abs += weight * tl.abs(positive)
        negative_abs += weight * tl.abs(negative)
        positive_square += weight * (positive * positive)
        negative_square += weight * (negative * negative)
        deviation += weight * tl.abs(d)
        largest = tl.maximum(largest, tl.abs(d))
        if inputs.v_ref is not None:
            delta = v_theta - load(inputs.v_ref, row, start, inside, dtype, BLOCK)
            if GENERAL:
                delta = tl.where(weight > 0, delta, 0)
            kl += weight * (delta * delta)
        if GENERAL:
            # Last: before the other sums there would not be registers for all on sm_100.
            positive_part, negative_part = _shares(inputs, sample, row, start, inside, dtype, BLOCK)
            positive_share += weight * (positive_part * (positive * positive))
            negative_share += weight * (negative_part * (negative * negative))
    plane = tl.num_programs(0).to(tl.int64)
    sums += program
    tl.store(sums, tl.sum(positive_abs, 0))
    tl.store(sums + plane, tl.sum(negative_abs, 0))
    tl.store(sums + 2 * plane, tl.sum(positive_square, 0))
    tl.store(sums + 3 * plane, tl.sum(negative_square, 0))
    tl.store(sums + 4 * plane, tl.sum(kl, 0))
    tl.store(sums + 5 * plane, tl.sum(deviation, 0))
    tl.store(sums + 6 * plane, tl.max(largest, 0))
    if GENERAL:
        tl.store(sums + 7 * plane, tl.sum(size, 0))
        tl.store(sums + 8 * plane, tl.sum(positive_share, 0))
        tl.store(sums + 9 * plane, tl.sum(negative_share, 0))


@triton.jit
def _finish(
    inputs,
    sums,
    details,
    loss,
    slices: tl.int64,
    batch: tl.int64,
    elements: tl.int64,
    adv_clip_max,
    kl_weight,
    WEIGHTING: tl.constexpr,
    PREDICTION: tl.constexpr,
    KL_SPACE: tl.constexpr,
    GENERAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per-sample values and the loss, in float64 and by one program: there are only a few numbers a sample.

    GENERAL adds three rows to ``details`` for the gradient: the sum of the mask, and the means of e+^2 and e-^2 by
    what they count in the policy loss.
    """
    dtype: tl.constexpr = loss.dtype.element_ty
    plane = batch * slices
    clip = number(adv_clip_max, tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        wanted = row < batch
        # Rows past the end repeat the last sample.
        sample = tl.minimum(row, batch - 1)
        # Blocks are reduced after the loop, so that no load waits for the threads to exchange what they have.
        positive_abs = tl.zeros((ROWS, COLUMNS), tl.float64)
        negative_abs = positive_abs
        positive_square = positive_abs
        negative_square = positive_abs
        kl = positive_abs
        deviation = positive_abs
        largest = positive_abs
        size = positive_abs
        positive_share = positive_abs
        negative_share = positive_abs
        for column in range(0, slices, COLUMNS):
            slice = column + tl.arange(0, COLUMNS)
            at = (sample * slices)[:, None] + slice[None, :]
            inside = (slice < slices)[None, :]
            positive_abs += tl.load(sums + at, inside, other=0)
            negative_abs += tl.load(sums + plane + at, inside, other=0)
            positive_square += tl.load(sums + 2 * plane + at, inside, other=0)
            negative_square += tl.load(sums + 3 * plane + at, inside, other=0)
            kl += tl.load(sums + 4 * plane + at, inside, other=0)
            deviation += tl.load(sums + 5 * plane + at, inside, other=0)
            largest = tl.maximum(largest, tl.load(sums + 6 * plane + at, inside, other=0))
            if GENERAL:
                size += tl.load(sums + 7 * plane + at, inside, other=0)
                positive_share += tl.load(sums + 8 * plane + at, inside, other=0)
                negative_share += tl.load(sums + 9 * plane + at, inside, other=0)
        t = unit(inputs.t, sample, tl.float64)
        if GENERAL:
            n = tl.sum(size, 1)
            # A sample whose mask is empty counts as nothing, not as NaN.
            n = tl.where(n > 0, n, 1)
        else:
            n = elements.to(tl.float64)
        # One division instead of one for every mean.
        mean = 1 / n
        positive_weight = tl.full((ROWS,), 1, tl.float64)
        negative_weight = positive_weight
        if WEIGHTING == "adaptive":
            positive_weight = _at_least(_MIN_WEIGHT, tl.sum(positive_abs, 1) * mean)
            negative_weight = _at_least(_MIN_WEIGHT, tl.sum(negative_abs, 1) * mean)
        factor = _time_weighting(t, WEIGHTING) * mean
        positive = factor * tl.sum(positive_square, 1) / positive_weight
        negative = factor * tl.sum(negative_square, 1) / negative_weight
        if GENERAL:
            positive_part = tl.sum(positive_share, 1) * mean
            negative_part = tl.sum(negative_share, 1) * mean
            tl.store(details + 8 * batch + row, n.to(dtype), wanted)
            tl.store(details + 9 * batch + row, positive_part.to(dtype), wanted)
            tl.store(details + 10 * batch + row, negative_part.to(dtype), wanted)
            policy = positive_part / positive_weight + negative_part / negative_weight
            policy *= _time_weighting(t, WEIGHTING)
        else:
            r = unit(inputs.r, sample, tl.float64)
            policy = r * positive + (1 - r) * negative
        policy = clip * policy / _beta(inputs, sample, tl.float64)
        mean_kl = tl.sum(kl, 1) * mean
        if inputs.v_ref is not None:
            mean_kl *= _kl_factor(t, PREDICTION, KL_SPACE)
        mean_deviation = tl.sum(deviation, 1) * mean
        # A maximum may drop NaN, a sum does not.
        maximum = tl.where(mean_deviation == mean_deviation, tl.max(largest, 1), mean_deviation)
        tl.store(details + row, policy.to(dtype), wanted)
        tl.store(details + batch + row, positive.to(dtype), wanted)
        tl.store(details + 2 * batch + row, negative.to(dtype), wanted)
        tl.store(details + 3 * batch + row, positive_weight.to(dtype), wanted)
        tl.store(details + 4 * batch + row, negative_weight.to(dtype), wanted)
        tl.store(details + 5 * batch + row, mean_kl.to(dtype), wanted)
        tl.store(details + 6 * batch + row, mean_deviation.to(dtype), wanted)
        tl.store(details + 7 * batch + row, maximum.to(dtype), wanted)
        value = policy + number(kl_weight, tl.float64) * mean_kl
        total += tl.where(wanted, value * _loss_weight(inputs, sample, batch), 0)
    tl.store(loss, tl.sum(total, 0).to(dtype))


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def _through_weight(factor, share, weight):
    """Factor of the error's sign in the gradient through w, which where it is clamped is a constant."""
    return tl.where(weight > _MIN_WEIGHT, -_divide(0.5 * factor * share, weight * weight), 0)


@triton.jit
def _gradient(
    inputs,
    coefficients,
    sample,
    row,
    start,
    inside,
    PREDICTION: tl.constexpr,
    GENERAL: tl.constexpr,
    DETACHED: tl.constexpr,
    FEW: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d v_theta by factors of e+ and e-, before r if GENERAL; of v_theta - v_ref; of the errors' signs."""
    positive, negative, kl, positive_sign, negative_sign = coefficients
    v_theta, _, base, step = _errors(inputs, sample, row, start, inside, dtype, PREDICTION, BLOCK)
    # A weight of few errors, as a mask or a segment may leave them, nearly cancels with each of them, which is lost if
    # they are taken apart again.
    if GENERAL:
        weight = _mask(inputs, row, start, inside, dtype, BLOCK)
        positive_part, negative_part = _shares(inputs, sample, row, start, inside, dtype, BLOCK)
        value = positive_part * (positive * (base + step)) - negative_part * (negative * (base - step))
    elif FEW:
        value = positive * (base + step) - negative * (base - step)
    else:
        # The same in a form that is exactly 0 where r = 1/2 and d = 0.
        value = (positive - negative) * base + (positive + negative) * step
    if not DETACHED:
        value += positive_sign * _sign(base + step) - negative_sign * _sign(base - step)
    if inputs.v_ref is not None:
        value += kl * (v_theta - load(inputs.v_ref, row, start, inside, dtype, BLOCK))
    if GENERAL:
        value = tl.where(weight > 0, weight * value, 0)
    return value


@tuned
@triton.jit
def _differentiate(
    inputs,
    details,
    grad,
    grad_loss,
    policy_factor,
    kl_factor,
    batch: tl.int64,
    slices: tl.int32,
    WEIGHTING: tl.constexpr,
    PREDICTION: tl.constexpr,
    KL_SPACE: tl.constexpr,
    GENERAL: tl.constexpr,
    DETACHED: tl.constexpr,
    FEW: tl.constexpr,
    elements: tl.int64,
    item_bytes: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad`` from the rows of ``details`` that hold w+ and w-, and if GENERAL from those after the eighth.

    One program for each block, or for each slice of a segment.
    """
    # Backwards, as what the sums read last may still be in cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    if inputs.segments is None:
        sample, first, inside = place(program, elements, BLOCK)
        row = sample
    else:
        sample, row, first, end = _slice(inputs, program, slices, 0, elements)
    loss_weight = _loss_weight(inputs, sample, batch)
    if grad_loss is not None:
        loss_weight *= tl.load(grad_loss)
    loss_weight = loss_weight.to(dtype)
    t = unit(inputs.t, sample, dtype)
    _, push = _affine(t, PREDICTION)
    positive_weight = tl.load(details + 3 * batch + sample)
    negative_weight = tl.load(details + 4 * batch + sample)
    factor = loss_weight * number(policy_factor, dtype) * push * _time_weighting(t, WEIGHTING)
    kl = loss_weight * number(kl_factor, dtype) * _kl_factor(t, PREDICTION, KL_SPACE)
    if GENERAL:
        n = tl.load(details + 8 * batch + sample)
        factor = _divide(factor, n)
        positive_sign = _through_weight(factor, tl.load(details + 9 * batch + sample), positive_weight)
        negative_sign = _through_weight(factor, tl.load(details + 10 * batch + sample), negative_weight)
        positive, negative = _divide(factor, positive_weight), _divide(factor, negative_weight)
        coefficients = positive, negative, _divide(kl, n), positive_sign, negative_sign
    else:
        r = unit(inputs.r, sample, dtype)
        positive, negative = _divide(factor * r, positive_weight), _divide(factor * (1 - r), negative_weight)
        coefficients = positive, negative, kl, factor * 0, factor * 0
    if inputs.segments is None:
        value = _gradient(
            inputs, coefficients, sample, row, first, inside, PREDICTION, GENERAL, DETACHED, FEW, dtype, BLOCK
        )
        store(grad, row, first, inside, value, BLOCK)
    else:
        for start in range(first, end, BLOCK):
            inside = tl.arange(0, BLOCK) < end - start
            value = _gradient(
                inputs, coefficients, sample, row, start, inside, PREDICTION, GENERAL, DETACHED, FEW, dtype, BLOCK
            )
            store(grad, row, start, inside, value, BLOCK)


def _view(x: Tensor, inputs: LossInputs) -> View:
    """View of a tensor of x0's shape; packed ones are one row."""
    return view(x if inputs.segments is None else x[None])


def _views(inputs: LossInputs, options: Options, v_ref: Tensor | None) -> _Views:
    v_theta, v_old, x_t, x0 = (_view(x, inputs) for x in inputs[:4])
    one_r = inputs.r.ndim == 1

    def of_elements(x: Tensor | None) -> View | None:
        return None if x is None else _view(x.expand(inputs.x0.shape), inputs)

    return _Views(
        v_theta,
        v_old,
        x_t,
        x0,
        view(inputs.t),
        maybe(inputs.beta),
        exact(options.beta),
        view(inputs.r) if one_r else None,
        of_elements(None if one_r else inputs.r),
        None if v_ref is None else _view(v_ref, inputs),
        of_elements(inputs.mask),
        of_elements(inputs.policy_weight),
        inputs.segments,
        maybe(inputs.loss_weight),
    )


def _general(inputs: LossInputs, options: Options) -> bool:
    each = inputs.mask is not None or inputs.policy_weight is not None or inputs.r.ndim > 1
    return each or inputs.segments is not None or not options.detach_weight


def _bytes(inputs: LossInputs, *more: Tensor | None) -> int:
    r = inputs.r if inputs.r.ndim > 1 else None
    return item_bytes(*inputs[:4], inputs.mask, inputs.policy_weight, r, *more)


def _slices(inputs: LossInputs) -> tuple[int, int]:
    """Slices per sample and their length: enough to fill a chip, and so short that float32 sums stay accurate.

    The slices of a segment, of which only the device knows the length, have that length on average.
    """
    batch, elements = len(inputs.t), cdiv(inputs.x0.numel(), len(inputs.t))
    length = 1024 * min(32, cdiv(batch * elements, 2048 * 1024))
    return cdiv(elements, length), length


def nft_loss(
    inputs: LossInputs, options: Options, *, grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scalar loss, (8, B) per-sample values, and d loss / d v_theta in ``grad_dtype`` if given.

    More rows may follow the eight, which ``nft_loss_gradient`` needs.
    """
    x0, batch, general = inputs.x0, len(inputs.t), _general(inputs, options)
    dtype = compute_dtype(*inputs[:4], inputs.v_ref)
    elements = x0.numel() // len(x0)
    slices, length = _slices(inputs)
    sums = x0.new_empty((10 if general else 7) * batch * slices, dtype=dtype)
    details, loss = x0.new_empty((11 if general else 8, batch), dtype=dtype), x0.new_empty((), dtype=dtype)
    views = _views(inputs, options, inputs.v_ref)
    columns = min(CELLS, next_power_of_2(slices))
    rows = min(CELLS // columns, next_power_of_2(batch))
    with torch.cuda.device_of(x0):
        _sum_slices[(batch * slices,)](
            views,
            sums,
            slices,
            length,
            options.prediction,
            general,
            elements,
            _bytes(inputs, inputs.v_ref),
            compute(dtype),
        )
        _finish[(1,)](
            views,
            sums,
            details,
            loss,
            slices,
            batch,
            elements,
            exact(options.adv_clip_max),
            exact(options.kl_weight),
            options.weighting,
            options.prediction,
            options.kl_space,
            general,
            rows,
            columns,
            num_warps=max(1, rows * columns // 128),
            **OPTIONS,
        )
    if grad_dtype is None:
        return loss, details, None
    return loss, details, nft_loss_gradient(inputs, options, details=details, grad_dtype=grad_dtype)


def nft_loss_gradient(
    inputs: LossInputs,
    options: Options,
    *,
    details: Tensor,
    grad_dtype: torch.dtype,
    grad_loss: Tensor | None = None,
) -> Tensor:
    """d loss / d v_theta, from the per-sample values of the loss, times the scalar ``grad_loss`` if given."""
    grad, x0, batch = torch.empty_like(inputs.v_theta, dtype=grad_dtype), inputs.x0, len(inputs.t)
    v_ref, general = inputs.v_ref if options.kl_weight > 0 else None, _general(inputs, options)
    slices, elements = _slices(inputs)[0], x0.numel() // len(x0)
    # The general kernel divides by the sum of the mask.
    n = 1 if general else elements
    with torch.cuda.device_of(x0):
        _differentiate[blocks_of(x0) if inputs.segments is None else (batch * slices,)](
            _views(inputs, options, v_ref),
            details,
            _view(grad, inputs),
            grad_loss,
            exact(2 * options.adv_clip_max / n),
            exact(2 * options.kl_weight / n),
            batch,
            slices,
            options.weighting,
            options.prediction,
            options.kl_space,
            general,
            options.detach_weight,
            not general and elements <= _FEW,
            elements,
            _bytes(inputs, v_ref, grad),
            compute(details.dtype),
        )
    return grad
