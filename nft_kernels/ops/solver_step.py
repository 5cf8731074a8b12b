"""``solver_step``: one row of a solver's table, with guidance, noise and log-probability in the same pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import List, NamedTuple  # noqa: UP035

import torch
from torch import Tensor

from ..backends import choose, load
from ..backends._memory import empty_like
from ..reference import add_noise as noise_reference
from ..reference import solver_step as reference
from ..solvers import SolverTable
from . import _validate


class SolverStep(NamedTuple):
    """Result of ``solver_step``. Nothing in it carries a gradient."""

    x: Tensor
    """x' of x's shape and dtype."""
    history: tuple[Tensor, ...]
    """What the next call takes as ``history``, newest first; as short as the rows to come allow. It may hold v itself:
    of a model that writes each velocity over the last one, as a captured CUDA graph does, give copies."""
    x0: Tensor | None
    """x - t v, of x's dtype, if asked for."""
    log_prob: Tensor | None
    """(B,) mean over elements of log N(x'; mean, c), if asked for."""


def _outputs(x: Tensor, want_h: bool, want_x0: bool, want_square: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for x', h_0, x0 and mean z^2; an empty tensor stands for each that is not wanted."""

    def room(wanted: bool) -> Tensor:
        return empty_like(x) if wanted else x.new_empty(0)

    return room(True), room(want_h), room(want_x0), x.new_empty(len(x) if want_square else 0, dtype=torch.float64)


def _run(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    noise: Tensor | None,
    history: List[Tensor],  # noqa: UP006 (torch 2.6 reads the schema from these, and knows no list)
    seed: Tensor | None,
    sample: Tensor | None,
    a: float,
    b: List[float],  # noqa: UP006
    c: float,
    p: float,
    q: float,
    t: float,
    guidance: float,
    want_h: bool,
    want_x0: bool,
    want_square: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coefficients = reference.Coefficients(a, b, c, p, q, t, guidance)
    outputs = _outputs(x, want_h, want_x0, want_square)
    if backend != "reference":
        load(backend).solver_step(x, v, v_uncond, noise, history, seed, sample, coefficients, *outputs)
        return outputs
    if seed is not None and sample is not None:
        noise = noise_reference.normals(seed, sample, x[0].numel()).view(x.shape)
    results = reference.solver_step(x, v, v_uncond, noise, history, coefficients)
    for target, result in zip(outputs, results, strict=True):
        if target.numel() and result is not None:
            target.copy_(result)
    return outputs


_op = torch.library.custom_op("nft_kernels::solver_step", _run, mutates_args=())


@_op.register_fake
def _fake(x, v, v_uncond, noise, history, seed, sample, a, b, c, p, q, t, guidance, want_h, want_x0, want_square, _):
    return _outputs(x, want_h, want_x0, want_square)


def solver_step(
    table: SolverTable,
    i: int,
    x: Tensor,
    v: Tensor,
    history: Sequence[Tensor] = (),
    *,
    v_uncond: Tensor | None = None,
    guidance: float | None = None,
    seed: int | Tensor | None = None,
    noise: Tensor | None = None,
    x0: bool = False,
    log_prob: bool = False,
    backend: str = "auto",
) -> SolverStep:
    """Apply row ``i`` of a solver's table: x' = a x + sum_j b_j h_j + c z, where x and v make h_0.

    Args:
        table: from ``solvers.table``.
        i: the row; v was evaluated at x and ``table.times[i]``.
        x: state (B, ...), float32, bfloat16, float16 or float64, any strides. Keep it in float32: a rollout adds up
            many small steps.
        v: velocity of x's shape, of any of these dtypes.
        history: what the step before returned; empty at the first.
        v_uncond: unconditional velocity for classifier-free guidance (Ho and Salimans, arXiv 2207.12598):
            v_uncond + guidance (v - v_uncond) takes v's place. Needs ``guidance``.
        guidance: scale; 1 is v itself.
        seed: draws z in the kernel, as in ``add_noise``: an int, or an int64 tensor (B,). The row is part of the
            noise counter, so one seed serves a whole rollout and never repeats the noise that ``add_noise`` draws
            from it. Not used by a row without noise.
        noise: z itself, of x's shape. A row with noise needs exactly one of ``seed`` and ``noise``.
        x0: also return the prediction x - t v.
        log_prob: also return the mean over elements of the Gaussian log-density of x', Flow-GRPO's convention, with
            all constants. It is that of x' before it is rounded to x's dtype.
        backend: ``auto``, ``native``, ``triton`` or ``reference``.

    Returns:
        ``SolverStep``.

    Raises:
        ValueError, TypeError: an argument that does not fit, named, with what is accepted.
        RuntimeError: an explicit backend that cannot run.
    """
    if not isinstance(table, SolverTable):
        raise TypeError(f"table: got {type(table).__name__}, accepted is a SolverTable from solvers.table")
    if isinstance(i, bool) or not isinstance(i, _validate.WHOLE):
        raise TypeError(f"i: got {type(i).__name__}, accepted is an int")
    if not 0 <= i < len(table.rows):
        raise ValueError(f"i: got {i}, accepted are rows 0 to {len(table.rows) - 1} of {table.name}")
    row = table.rows[i]
    _validate.latents("x", x)
    _validate.tensor_like("v", v, x, "x")
    if not isinstance(history, Sequence):
        raise TypeError(f"history: got {type(history).__name__}, accepted is what the step before returned")
    if len(history) != table.depth(i):
        raise ValueError(
            f"history: got {len(history)} tensors, accepted are the {table.depth(i)} that row {i - 1} returned"
        )
    for j, h in enumerate(history):
        _validate.tensor_like(f"history[{j}]", h, x, "x")
    _validate.flag("x0", x0)
    _validate.flag("log_prob", log_prob)
    _validate.both_or_neither("v_uncond, guidance", v_uncond, guidance)
    if v_uncond is not None and guidance is not None:
        _validate.tensor_like("v_uncond", v_uncond, x, "x")
        _validate.number("guidance", guidance, positive=False)
    if seed is not None and noise is not None:
        raise ValueError("seed, noise: got both, accepted is one of them")
    if row.c > 0 and seed is None and noise is None:
        raise ValueError(f"seed, noise: got neither, accepted is one of them, as row {i} of {table.name} draws noise")
    if log_prob and row.c == 0:
        raise ValueError(f"log_prob: got True, accepted is False, as row {i} of {table.name} draws no noise")
    seeds, sample = (None, None) if seed is None else _validate.seeds(seed, x)
    if noise is not None:
        _validate.tensor_like("noise", noise, x, "x")
    if row.c == 0:
        seeds = sample = noise = None
    elif sample is not None:
        # add_noise leaves the upper half of the sample word zero.
        sample = sample + ((i + 1) << 32)
    p, q = table.prediction(i)
    keep = table.depth(i + 1)
    # A velocity without guidance goes into the history as it came.
    want_h = keep > 0 and not ((p, q) == (0, 1) and v_uncond is None)
    same = want_h and (p, q) == (1, -row.t)
    backend = choose(backend, x)
    run = _op if torch.compiler.is_compiling() else _run
    out, written, prediction, square = run(
        x.detach().resolve_neg(),
        v.detach().resolve_neg(),
        None if v_uncond is None else v_uncond.detach().resolve_neg(),
        None if noise is None else noise.detach().resolve_neg(),
        [h.detach().resolve_neg() for h in history],
        seeds,
        sample,
        row.a,
        list(row.b),
        row.c,
        p,
        q,
        row.t,
        1.0 if guidance is None else float(guidance),
        want_h,
        x0 and not same,
        log_prob,
        backend,
    )
    newest = written if want_h else v.detach()
    density = None
    if log_prob:
        density = (-square / 2 - math.log(row.c) - math.log(2 * math.pi) / 2).to(reference.compute_dtype(x, v, noise))
    return SolverStep(out, (newest, *history)[:keep], (written if same else prediction) if x0 else None, density)
