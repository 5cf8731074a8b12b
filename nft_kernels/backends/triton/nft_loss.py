"""The loss in two launches, sums over slices of samples and all that follows from them, and the gradient in a third.

Sums are taken in a fixed order and stay on the device: reruns give the same bits, and a CUDA graph can hold it all.
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
    compute,
    exact,
    item_bytes,
    load,
    maybe,
    number,
    place,
    scalar,
    store,
    tuned,
    view,
)

_MIN_WEIGHT = tl.constexpr(MIN_WEIGHT)
# Samples times slices that ``_finish`` takes at once.
CELLS = 512


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
    r: View
    beta: View
    v_ref: View | None
    outer: View | None


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
    factor = one
    if PREDICTION != KL_SPACE:
        if PREDICTION == "v":
            factor = t
        elif PREDICTION == "x0":
            factor = _divide(one, t)
        elif KL_SPACE == "x0":
            factor = _divide(t, one - t)
        else:
            factor = _divide(one, one - t)
    return factor * factor


@triton.jit
def _outer(inputs, sample, batch):
    """What a sample counts in the loss."""
    if inputs.outer is None:
        return tl.full(sample.shape, 1, tl.float64) / batch
    else:
        return scalar(inputs.outer, sample, tl.float64)


@triton.jit
def _errors(inputs, sample, start, inside, dtype: tl.constexpr, PREDICTION: tl.constexpr, BLOCK: tl.constexpr):
    """p_theta, d = p_theta - p_old, and what the errors e+- = base +- step consist of."""
    p_theta = load(inputs.v_theta, sample, start, inside, dtype, BLOCK)
    p_old = load(inputs.v_old, sample, start, inside, dtype, BLOCK)
    x_t = load(inputs.x_t, sample, start, inside, dtype, BLOCK)
    x0 = load(inputs.x0, sample, start, inside, dtype, BLOCK)
    keep, push = _affine(scalar(inputs.t, sample, dtype), PREDICTION)
    d = p_theta - p_old
    if PREDICTION != "v":
        x_t = keep * x_t
    return p_theta, d, (x_t - x0) + push * p_old, (push * scalar(inputs.beta, sample, dtype)) * d


@triton.jit
def _time_weighting(t, WEIGHTING: tl.constexpr):
    if WEIGHTING == "t":
        return t
    elif WEIGHTING == "t2":
        return t * t
    else:
        return tl.full(t.shape, 1, t.dtype)


@triton.jit
def _of(kind: tl.constexpr, table):
    """One row of a table of 8."""
    return tl.sum(tl.where((tl.arange(0, 8) == kind)[:, None], table, 0), 0)


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
    elements: tl.int64,
    item_bytes: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each slice of ``length`` elements of one sample; ``sums`` is (7, B, slices)."""
    program = tl.program_id(0)
    sample = (program // slices).to(tl.int64)
    first = (program % slices).to(tl.int64) * length
    end = tl.minimum(first + length, elements)
    positive_abs = tl.zeros((BLOCK,), dtype)
    negative_abs = tl.zeros((BLOCK,), dtype)
    positive_square = tl.zeros((BLOCK,), dtype)
    negative_square = tl.zeros((BLOCK,), dtype)
    kl = tl.zeros((BLOCK,), dtype)
    deviation = tl.zeros((BLOCK,), dtype)
    largest = tl.zeros((BLOCK,), dtype)
    for start in range(first, end, BLOCK):
        inside = tl.arange(0, BLOCK) < end - start
        v_theta, d, base, step = _errors(inputs, sample, start, inside, dtype, PREDICTION, BLOCK)
        positive = base + step
        negative = base - step
        positive_abs += tl.abs(positive)
        negative_abs += tl.abs(negative)
        positive_square += positive * positive
        negative_square += negative * negative
        deviation += tl.abs(d)
        largest = tl.maximum(largest, tl.abs(d))
        if inputs.v_ref is not None:
            delta = v_theta - load(inputs.v_ref, sample, start, inside, dtype, BLOCK)
            kl += delta * delta
    plane = tl.num_programs(0).to(tl.int64)
    sums += program
    tl.store(sums, tl.sum(positive_abs, 0))
    tl.store(sums + plane, tl.sum(negative_abs, 0))
    tl.store(sums + 2 * plane, tl.sum(positive_square, 0))
    tl.store(sums + 3 * plane, tl.sum(negative_square, 0))
    tl.store(sums + 4 * plane, tl.sum(kl, 0))
    tl.store(sums + 5 * plane, tl.sum(deviation, 0))
    tl.store(sums + 6 * plane, tl.max(largest, 0))


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Per-sample values and the loss, in float64 and by one program: there are only a few numbers a sample."""
    dtype: tl.constexpr = loss.dtype.element_ty
    kind = tl.arange(0, 8)
    n = elements.to(tl.float64)
    clip = number(adv_clip_max, tl.float64)
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        # Rows past the end repeat the last sample.
        sample = tl.minimum(row, batch - 1)
        table = tl.zeros((8, ROWS, COLUMNS), tl.float64)
        for column in range(0, slices, COLUMNS):
            slice = column + tl.arange(0, COLUMNS)
            at = (kind[:, None, None] * batch + sample[None, :, None]) * slices + slice[None, None, :]
            inside = (kind < 7)[:, None, None] & (slice < slices)[None, None, :]
            value = tl.load(sums + at, inside, other=0).to(tl.float64)
            table = tl.where(kind[:, None, None] == 6, tl.maximum(table, value), table + value)
        largest = _of(6, tl.max(table, 2))
        table = tl.sum(table, 2)
        t = scalar(inputs.t, sample, tl.float64)
        r = scalar(inputs.r, sample, tl.float64)
        positive_weight = tl.full((ROWS,), 1, tl.float64)
        negative_weight = positive_weight
        if WEIGHTING == "adaptive":
            positive_weight = _at_least(_MIN_WEIGHT, _of(0, table) / n)
            negative_weight = _at_least(_MIN_WEIGHT, _of(1, table) / n)
        factor = _time_weighting(t, WEIGHTING) / n
        positive = factor * _of(2, table) / positive_weight
        negative = factor * _of(3, table) / negative_weight
        policy = clip * (r * positive + (1 - r) * negative) / scalar(inputs.beta, sample, tl.float64)
        kl = _of(4, table) / n
        if inputs.v_ref is not None:
            kl *= _kl_factor(t, PREDICTION, KL_SPACE)
        deviation = _of(5, table) / n
        # A maximum may drop NaN, a sum does not.
        largest = tl.where(deviation == deviation, largest, deviation)
        wanted = row < batch
        tl.store(details + row, policy.to(dtype), wanted)
        tl.store(details + batch + row, positive.to(dtype), wanted)
        tl.store(details + 2 * batch + row, negative.to(dtype), wanted)
        tl.store(details + 3 * batch + row, positive_weight.to(dtype), wanted)
        tl.store(details + 4 * batch + row, negative_weight.to(dtype), wanted)
        tl.store(details + 5 * batch + row, kl.to(dtype), wanted)
        tl.store(details + 6 * batch + row, deviation.to(dtype), wanted)
        tl.store(details + 7 * batch + row, largest.to(dtype), wanted)
        total += tl.where(wanted, (policy + number(kl_weight, tl.float64) * kl) * _outer(inputs, sample, batch), 0)
    tl.store(loss, tl.sum(total, 0).to(dtype))


@tuned
@triton.jit
def _differentiate(
    inputs,
    details,
    grad,
    policy_factor,
    kl_factor,
    batch: tl.int64,
    WEIGHTING: tl.constexpr,
    PREDICTION: tl.constexpr,
    KL_SPACE: tl.constexpr,
    elements: tl.int64,
    item_bytes: tl.constexpr,
    dtype: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``grad`` from the weights w+ and w-, which are rows 3 and 4 of ``details``."""
    # Backwards, as what the sums read last may still be in cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, start, inside = place(program, elements, BLOCK)
    outer = _outer(inputs, sample, batch).to(dtype)
    t = scalar(inputs.t, sample, dtype)
    r = scalar(inputs.r, sample, dtype)
    _, push = _affine(t, PREDICTION)
    factor = outer * number(policy_factor, dtype) * push * _time_weighting(t, WEIGHTING)
    positive = _divide(factor * r, tl.load(details + 3 * batch + sample))
    negative = _divide(factor * (1 - r), tl.load(details + 4 * batch + sample))
    v_theta, _, base, step = _errors(inputs, sample, start, inside, dtype, PREDICTION, BLOCK)
    # That is positive * e+ - negative * e-, in a form that is exactly 0 where r = 1/2 and d = 0.
    value = (positive - negative) * base + (positive + negative) * step
    if inputs.v_ref is not None:
        v_ref = load(inputs.v_ref, sample, start, inside, dtype, BLOCK)
        value += outer * number(kl_factor, dtype) * _kl_factor(t, PREDICTION, KL_SPACE) * (v_theta - v_ref)
    store(grad, sample, start, inside, value, BLOCK)


def _views(inputs: LossInputs, v_ref: Tensor | None) -> _Views:
    v_theta, v_old, x_t, x0, t, r, beta, *_, outer = inputs
    return _Views(*map(view, (v_theta, v_old, x_t, x0, t, r, beta)), maybe(v_ref), maybe(outer))


def _slices(batch: int, elements: int) -> tuple[int, int]:
    """Slices per sample and their length: enough to fill a chip, and so short that float32 sums stay accurate."""
    length = 1024 * min(32, triton.cdiv(batch * elements, 2048 * 1024))
    return triton.cdiv(elements, length), length


def nft_loss(
    inputs: LossInputs, options: Options, *, grad_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scalar loss, (8, B) per-sample values, and d loss / d v_theta in ``grad_dtype`` if given."""
    tensors, x0 = (*inputs[:4], inputs.v_ref), inputs.x0
    dtype = compute_dtype(*tensors)
    batch, elements = len(x0), x0.numel() // len(x0)
    slices, length = _slices(batch, elements)
    sums = x0.new_empty(7 * batch * slices, dtype=dtype)
    details, loss = x0.new_empty((8, batch), dtype=dtype), x0.new_empty((), dtype=dtype)
    views = _views(inputs, inputs.v_ref)
    columns = min(CELLS, triton.next_power_of_2(slices))
    with torch.cuda.device_of(x0):
        _sum_slices[(batch * slices,)](
            views, sums, slices, length, options.prediction, elements, item_bytes(*tensors), compute(dtype)
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
            min(CELLS // columns, triton.next_power_of_2(batch)),
            columns,
            num_warps=8,
            **OPTIONS,
        )
    if grad_dtype is None:
        return loss, details, None
    return loss, details, nft_loss_gradient(inputs, options, details=details, grad_dtype=grad_dtype)


def nft_loss_gradient(inputs: LossInputs, options: Options, *, details: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """d loss / d v_theta, from the per-sample values of the loss."""
    grad, x0 = torch.empty_like(inputs.v_theta, dtype=grad_dtype), inputs.x0
    v_ref = inputs.v_ref if options.kl_weight > 0 else None
    with torch.cuda.device_of(x0):
        _differentiate[blocks_of(x0)](
            _views(inputs, v_ref),
            details,
            view(grad),
            exact(2 * options.adv_clip_max * len(x0) / x0.numel()),
            exact(2 * options.kl_weight * len(x0) / x0.numel()),
            len(x0),
            options.weighting,
            options.prediction,
            options.kl_space,
            x0.numel() // len(x0),
            item_bytes(*inputs[:4], v_ref, grad),
            compute(details.dtype),
        )
    return grad
