"""Solvers as tables: every update of every solver is x' = a x + sum_j b_j h_j + c z.

Rectified flow, x_t = (1-t) x0 + t eps and v = eps - x0, integrated from t = 1 (noise) down a list of sigmas. One row
is one evaluation of the model: at time ``t`` it gives v, which makes the newest entry h_0 of a short history (newest
first), and the row says how x moves. ``solver_step`` applies a row; a loop over the rows is the whole solver:

    solver, history = table("dpm++2M", schedule(10, shift=3.0)), ()
    for i, t in enumerate(solver.times):
        x, history, *_ = solver_step(solver, i, x, model(x, t), history)

To add a solver, write a function from sigmas and options to a table and register it; it then works everywhere:

    @register("my-euler")
    def my_euler(sigmas: Sigmas) -> SolverTable:
        \"\"\"The paper it comes from.\"\"\"
        return SolverTable("my-euler", 1, "velocity", tuple(Row(t, 1.0, (s - t,)) for t, s in pairwise(sigmas)))

Coefficients are Python floats (float64). In the half log-SNR lambda = log((1-t)/t) the ends of the path lie at
infinity; coefficients are written in ratios of sigmas, and there as limits: a polynomial through predictions loses the
one at lambda = -inf, for one, whose Lagrange weight vanishes. Nothing is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import Polynomial

Sigmas = tuple[float, ...]
_MOST_TERMS = 8
"""Of kMaxHistory in csrc/args.h."""
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class Row(NamedTuple):
    """One evaluation at time ``t`` and the update x' = a x + sum_j b[j] h_j + c z that follows it."""

    t: float
    a: float
    b: tuple[float, ...]
    c: float = 0.0


@dataclass(frozen=True)
class SolverTable:
    """Coefficients of a solver for one list of sigmas, hashable and immutable."""

    name: str
    order: int
    """Order of convergence of the rows between start and end, where the history is full."""
    history: str
    """What h_j are: ``velocity``, ``x0`` (x - t v) or ``noise`` (x + (1-t) v)."""
    rows: tuple[Row, ...]
    evaluations: int = 1
    """Evaluations of the model per step; a final step to t = 0 may need fewer."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what no kernel could apply."""
        if self.history not in ("velocity", "x0", "noise"):
            raise ValueError(f"history: got {self.history!r} of {self.name}, accepted are velocity, x0, noise")
        for i, row in enumerate(self.rows):
            fits = (
                isinstance(row, Row) and 0 <= row.t <= 1 and row.c >= 0 and 1 <= len(row.b) <= min(i + 1, _MOST_TERMS)
            )
            if not fits or not all(map(math.isfinite, (row.a, *row.b, row.c))):
                accepted = f"a time in [0, 1], a c of at least 0 and 1 to {min(i + 1, _MOST_TERMS)} b, all finite"
                raise ValueError(f"rows: got {row} as row {i} of {self.name}, accepted is a Row of {accepted}")

    @property
    def times(self) -> Sigmas:
        """Times at which the model is evaluated, one per row."""
        return tuple(row.t for row in self.rows)

    @property
    def noisy(self) -> list[int]:
        """The rows that draw noise."""
        return [i for i, row in enumerate(self.rows) if row.c > 0]

    @property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return bool(self.noisy)

    def prediction(self, i: int) -> tuple[float, float]:
        """(p, q) of row i's h = p x + q v. At t = 1 a noise prediction would be x itself, so there h is v."""
        t = self.rows[i].t
        if self.history == "velocity" or (self.history == "noise" and t == 1):
            return 0.0, 1.0
        return (1.0, -t) if self.history == "x0" else (1.0, 1 - t)

    def depth(self, i: int) -> int:
        """How many earlier h have to be kept before row i, for it and the rows after it."""
        return max([0, *(len(row.b) - 1 - later for later, row in enumerate(self.rows[i:]))])


SOLVERS: dict[str, Callable[..., SolverTable]] = {}
"""Every solver by name: a function (sigmas, **options) -> SolverTable."""


def register(name: str) -> Callable[[Callable[..., SolverTable]], Callable[..., SolverTable]]:
    """Make a builder known to ``table`` under ``name``; its parameters after the first are the options by name."""

    def add(build: Callable[..., SolverTable]) -> Callable[..., SolverTable]:
        SOLVERS[name] = build
        return build

    return add


def table(name: str, sigmas: Sequence[float], /, **options: Any) -> SolverTable:
    """Table of the solver ``name`` for falling times ``sigmas``.

    Args:
        name: one of ``SOLVERS``.
        sigmas: strictly falling times in [0, 1]; the model is evaluated at all but the last.
        options: the solver's own, such as ``eta`` or ``order``.

    Raises:
        ValueError: unknown name, sigmas that do not fall within [0, 1], an option of another type or out of range, or
            coefficients that float32 cannot hold.
        TypeError: sigmas that are no numbers, or an option that the solver does not have.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(SOLVERS)}")
    try:
        if isinstance(sigmas, str | bytes):
            raise TypeError
        times = tuple(float(s) for s in sigmas)
    except (TypeError, ValueError):
        raise TypeError(f"sigmas: got {sigmas!r}, accepted are strictly falling times in [0, 1]") from None
    if not times or not all(0 <= t <= 1 for t in times) or not all(t > s for t, s in pairwise(times)):
        raise ValueError(f"sigmas: got {list(times)}, accepted are strictly falling times in [0, 1]")
    _, *known = signature(SOLVERS[name]).parameters
    for option in options:
        if option not in known:
            near = get_close_matches(option.lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"accepted are {', '.join(known) or 'none'}"
            raise TypeError(f"{option}: unknown option of {name}, {hint}")
    # Coefficients are float64, and numpy's short floats would make them short.
    options = {key: value.item() if isinstance(value, np.generic) else value for key, value in options.items()}
    try:
        solver = SOLVERS[name](times, **options)
    except (TypeError, ValueError):
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"sigmas, options: got {list(times)}, {options}, for which {name} fails: {problem}") from error
    if not isinstance(solver, SolverTable):
        raise ValueError(f"{name}: got {type(solver).__name__}, accepted is a SolverTable")
    if not solver.rows and len(times) > 1:
        raise ValueError(f"{name}: got no rows for {len(times) - 1} steps, accepted is at least one")
    for row in solver.rows:
        held = all(abs(y) <= _LARGEST for y in (row.a, *row.b, row.c))
        # Noise that float32 rounds to 0 has no density.
        if not held or 0 < row.c < _SMALLEST:
            raise ValueError(f"sigmas, options: got {row} of {name}, accepted are coefficients that float32 holds")
    return solver


def _positive(name: str, value: float) -> None:
    # numpy's numbers are these too.
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value!r}, accepted are positive finite numbers")


def shifted(t: float, shift: float) -> float:
    """SD3's time shift, shift t / (1 + (shift-1) t) (Esser et al., arXiv 2403.03206); 1 leaves t as it is.

    Raises:
        ValueError: a shift that is not positive.
    """
    _positive("shift", shift)
    t, shift = float(t), float(shift)
    # 1 exactly: beside it a solver has no limit.
    return shift * t / (1 + (shift - 1) * t) if t < 1 else t


def schedule(steps: int, *, shift: float = 1.0, last: float | None = None) -> Sigmas:
    """``steps`` + 1 times from 1 to 0, evenly spaced and then shifted.

    Args:
        steps: number of steps.
        shift: SD3's shift; 1 gives the linear schedule, ``dynamic_shift`` the one that fits the picture's size.
        last: the last time above 0 before the shift. The others are spaced evenly between it and 1, as diffusers'
            FlowMatchEuler does with ``last=shifted(0.001, shift)``. By default all are spaced evenly between 1 and 0.

    Raises:
        ValueError: no whole number of steps above 0, a shift that is not positive, or ``last`` outside (0, 1).
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, accepted are positive integers")
    _positive("shift", shift)
    if last is not None and not (isinstance(last, Real) and 0 < last < 1):
        raise ValueError(f"last: got {last!r}, accepted is a number between 0 and 1")
    grid = np.linspace(1, 0, steps + 1) if last is None else np.append(np.linspace(1, float(last), steps), 0.0)
    return tuple(shifted(t, shift) for t in grid.tolist())


def dynamic_shift(tokens: int) -> float:
    """SD3's shift for a picture of ``tokens`` patches: e^mu with mu linear from 0.5 at 256 to 1.15 at 4096.

    Raises:
        ValueError: a number of tokens that is not positive, or far beyond those of a picture.
    """
    _positive("tokens", tokens)
    if tokens > 2**20:
        raise ValueError(f"tokens: got {tokens}, accepted are numbers up to 2**20")
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def _lambda(t: float) -> float:
    """Half log-SNR log((1-t)/t), infinite at both ends."""
    return math.inf if t == 0 else -math.inf if t == 1 else math.log1p(-t) - math.log(t)


def _phi(k: int, z: float) -> float:
    """phi_k(z) = (e^z - sum_{j<k} z^j / j!) / z^k, whose difference has no digits left where z is small."""
    if abs(z) < 1:
        return sum(z**j / math.factorial(j + k) for j in range(18))
    return math.expm1(z) / z if k == 1 else (_phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


def _row(t: float, a: float, b: Sequence[float]) -> Row:
    """A row without the zeros at the end of ``b``, so that no tensor is read for nothing."""
    used = max((j + 1 for j, weight in enumerate(b) if weight), default=1)
    return Row(t, a, tuple(float(weight) for weight in b[:used]))


def _orders(order: int, steps: int) -> list[int]:
    """Order of each step: it ramps up while the history fills and down to 1 at the end."""
    if isinstance(order, bool) or not isinstance(order, Integral) or order not in (1, 2, 3):
        raise ValueError(f"order: got {order!r}, accepted are 1, 2, 3")
    return [min(order, i + 1, steps - i) for i in range(steps)]


def _check_eta(eta: float, high: float = _LARGEST) -> None:
    if isinstance(eta, bool) or not isinstance(eta, Real) or not 0 <= eta <= high:
        raise ValueError(f"eta: got {eta!r}, accepted is a number in [0, {high:g}]")


@register("euler")
def euler(sigmas: Sigmas) -> SolverTable:
    """Euler on dx/dt = v, the sampler of rectified flow (Liu et al., arXiv 2209.03003)."""
    return SolverTable("euler", 1, "velocity", tuple(Row(t, 1.0, (s - t,)) for t, s in pairwise(sigmas)))


@register("heun")
def heun(sigmas: Sigmas) -> SolverTable:
    """Heun's method (Karras et al., arXiv 2206.00364): two evaluations a step, but Euler for a last step to 0."""
    rows = []
    for t, s in pairwise(sigmas):
        rows.append(Row(t, 1.0, (s - t,)))
        if s > 0:
            # From the Euler prediction x + (s-t) v_t to x + (s-t) (v_t + v_s) / 2.
            rows.append(Row(s, 1.0, ((s - t) / 2, (t - s) / 2)))
    return SolverTable("heun", 2, "velocity", tuple(rows), evaluations=2)


def _renoise(name: str, sigmas: Sigmas, deviation: Callable[[float, float], float]) -> SolverTable:
    """x' = (1-s) x0 + sqrt(s^2 - rho^2) eps + rho z with both predictions made from x and v."""
    rows = []
    for t, s in pairwise(sigmas):
        rho = deviation(t, s)
        kept = math.sqrt(s * s - rho * rho)
        rows.append(Row(t, (1 - s) + kept, (kept * (1 - t) - (1 - s) * t,), rho))
    return SolverTable(name, 1, "velocity", tuple(rows))


@register("ddim")
def ddim(sigmas: Sigmas, eta: float = 0.0) -> SolverTable:
    """DDIM (Song et al., arXiv 2010.02502): rho = eta s sqrt(1 - (s (1-t) / (t (1-s)))^2); eta = 0 is Euler."""
    _check_eta(eta, 1)
    return _renoise("ddim", sigmas, lambda t, s: eta * s * math.sqrt(1 - (s * (1 - t) / (t * (1 - s))) ** 2))


@register("cps")
def cps(sigmas: Sigmas, eta: float = 0.7) -> SolverTable:
    """Coefficients-preserving sampling (Wang and Yu, arXiv 2509.05952): rho = s sin(eta pi / 2)."""
    _check_eta(eta, 1)
    return _renoise("cps", sigmas, lambda t, s: s * math.sin(eta * math.pi / 2))


def _sde(name: str, sigmas: Sigmas, diffusion: Callable[[float], float]) -> SolverTable:
    """Euler-Maruyama on dx = (v + g^2 / (2t) (x + (1-t) v)) dt + g dw, which has the marginals of dx = v dt."""
    rows = []
    for t, s in pairwise(sigmas):
        g = diffusion(t)
        pull = g * g / (2 * t)
        rows.append(Row(t, 1 + pull * (s - t), ((1 + pull * (1 - t)) * (s - t),), g * math.sqrt(t - s)))
    return SolverTable(name, 1, "velocity", tuple(rows))


@register("flow-sde")
def flow_sde(sigmas: Sigmas, eta: float = 0.7) -> SolverTable:
    """Flow-GRPO (Liu et al., arXiv 2505.05470): g = eta sqrt(t / (1-t)), and at t = 1 eta sqrt(1 / (1 - sigmas[1])).

    g has no limit at t = 1; taking 1 - sigmas[1] for 1 - t in that one step is part of Flow-GRPO's definition.
    """
    _check_eta(eta)
    return _sde("flow-sde", sigmas, lambda t: eta * math.sqrt(t / (1 - (sigmas[1] if t == 1 else t))))


@register("dance-sde")
def dance_sde(sigmas: Sigmas, eta: float = 0.3) -> SolverTable:
    """DanceGRPO (Xue et al., arXiv 2505.07818): constant g = eta."""
    _check_eta(eta)
    return _sde("dance-sde", sigmas, lambda t: eta)


@register("mixed")
def mixed(
    sigmas: Sigmas, window: Sequence[int] | None = None, sde: str = "flow-sde", eta: float | None = None
) -> SolverTable:
    """MixGRPO (Li et al., arXiv 2507.21802): steps window[0] <= i < window[1] by ``sde``, all others by Euler.

    ``window`` is the first two steps by default, ``sde`` one of flow-sde, dance-sde, cps and ddim, and ``eta`` that
    solver's own by default.
    """
    if window is None:
        window = 0, min(2, len(sigmas) - 1)
    if sde not in ("flow-sde", "dance-sde", "cps", "ddim"):
        raise ValueError(f"sde: got {sde!r}, accepted are flow-sde, dance-sde, cps, ddim")
    if not (
        isinstance(window, Sequence)
        and [type(i) for i in window] == [int, int]
        and 0 <= window[0] <= window[1] < len(sigmas)
    ):
        raise ValueError(
            f"window: got {window!r}, accepted are two integers with 0 <= start <= stop <= {len(sigmas) - 1}"
        )
    start, stop = window
    noisy, plain = SOLVERS[sde](sigmas, **({} if eta is None else {"eta": eta})).rows, euler(sigmas).rows
    return SolverTable("mixed", 1, "velocity", plain[:start] + noisy[start:stop] + plain[stop:])


def _dpmpp(name: str, sigmas: Sigmas, order: int, reached: int) -> SolverTable:
    """DPM-Solver++ multistep: Taylor expansion of the x0 prediction in lambda by finite differences."""
    rows = []
    lam = [_lambda(t) for t in sigmas]
    for i, o in enumerate(_orders(order, len(sigmas) - 1)):
        t, s = sigmas[i : i + 2]
        weight = (t - s) / t  # (1-s) (1 - e^-h), the integral of a constant
        b = np.array([weight, 0.0, 0.0])
        if o > 1:
            h = lam[i + 1] - lam[i]
            r0 = (lam[i] - lam[i - 1]) / h
            slope = np.array([1.0, -1.0, 0.0]) / r0
            if o == 2:
                b += weight / 2 * slope
            else:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                change = slope - np.array([0.0, 1.0, -1.0]) / r1
                b += (1 - s) * h * _phi(2, -h) * (slope + r0 / (r0 + r1) * change)
                b += (1 - s) * h * _phi(3, -h) * change / (r0 + r1)
        rows.append(_row(t, s / t, b.tolist()))
    return SolverTable(name, reached, "x0", tuple(rows))


@register("dpm++1")
def dpmpp1(sigmas: Sigmas) -> SolverTable:
    """DPM-Solver++ of first order (Lu et al., arXiv 2211.01095), for rectified flow the same as Euler."""
    return _dpmpp("dpm++1", sigmas, 1, reached=1)


@register("dpm++2M")
def dpmpp2m(sigmas: Sigmas) -> SolverTable:
    """DPM-Solver++ 2M (Lu et al., arXiv 2211.01095), midpoint form; the first and the last step are Euler."""
    return _dpmpp("dpm++2M", sigmas, 2, reached=2)


@register("dpm++3M")
def dpmpp3m(sigmas: Sigmas) -> SolverTable:
    """DPM-Solver++ 3M (Lu et al., arXiv 2211.01095), as its authors' code and diffusers have it.

    They take the divided difference for the second derivative, half of it: three predictions, but order 2. The last
    step but one is of second order for any number of steps, where diffusers has that for fewer than 15 only.
    """
    return _dpmpp("dpm++3M", sigmas, 3, reached=2)


@register("deis")
def deis(sigmas: Sigmas, order: int = 2) -> SolverTable:
    """DEIS (Zhang and Chen, arXiv 2204.13902): the noise prediction interpolated in log rho, rho = t / (1-t)."""
    rows = []
    log_rho = [-_lambda(t) for t in sigmas]
    for i, o in enumerate(_orders(order, len(sigmas) - 1)):
        t, s = sigmas[i : i + 2]
        past = [u for u in log_rho[i - o + 1 : i + 1][::-1] if u < math.inf]
        if len(past) < 2:
            # From t = 1 this is Euler, as h_0 is v there.
            rows.append(Row(t, 1.0, (s - t,)) if t == 1 else Row(t, (1 - s) / (1 - t), ((s - t) / (1 - t),)))
            continue
        h = log_rho[i + 1] - log_rho[i]
        # From the step's end in units of h: there phi_k is the integral of e^(h (1-u)) u^(k-1) / (k-1)! from 0 to 1.
        nodes, scale = [(log_rho[i + 1] - u) / h for u in past], (1 - s) * t / (1 - t) * h
        b = []
        for node in nodes:
            others = [x for x in nodes if x != node]
            basis = math.prod((Polynomial([-x, 1.0]) / (node - x) for x in others), start=Polynomial([1.0]))
            b.append(scale * sum(c * math.factorial(d) * _phi(d + 1, h) for d, c in enumerate(basis.coef.tolist())))
        rows.append(_row(t, (1 - s) / (1 - t), b))
    return SolverTable("deis", order, "noise", tuple(rows))


def _unipc_weights(weight: float, h: float, nodes: list[float]) -> np.ndarray:
    """Weights of the x0 predictions at lambda_0 and at lambda_0 + h nodes, B(h) = e^-h - 1 ("bh2" of the paper)."""
    finite = [r for r in nodes if math.isfinite(r)]
    if len(nodes) == 1:
        rho = np.array([0.5])[: len(finite)]
    else:
        moments = [math.factorial(k) * _phi(k + 1, -h) / _phi(1, -h) for k in range(1, len(finite) + 1)]
        rho = np.linalg.solve(np.vander(finite, increasing=True).T, moments)
    differences = weight * rho / np.array(finite)
    return np.array([weight - differences.sum(), *differences])


@register("unipc")
def unipc(sigmas: Sigmas, order: int = 2) -> SolverTable:
    """UniPC (Zhao et al., arXiv 2302.04867): predictor of ``order``, and a corrector that costs no evaluation.

    The corrector moves the point the model was just evaluated at by a combination of predictions, so that it and the
    next predictor make one row.
    """
    orders = _orders(order, len(sigmas) - 1)
    lam = [_lambda(t) for t in sigmas]
    rows: list[Row] = []
    predicted = np.zeros(0)
    for i, o in enumerate(orders):
        t, s = sigmas[i : i + 2]
        b = np.zeros(order + 1)
        if i > 0:
            h = lam[i] - lam[i - 1]
            past = [(lam[i - 1 - k] - lam[i - 1]) / h for k in range(1, orders[i - 1])]
            base, newest, *older = _unipc_weights((sigmas[i - 1] - t) / sigmas[i - 1], h, [1.0, *past])
            corrected = np.array([newest, base, *older])
            b[: len(corrected)] += s / t * corrected
            b[1 : 1 + len(predicted)] -= s / t * predicted
        h = lam[i + 1] - lam[i]
        predicted = _unipc_weights((t - s) / t, h, [(lam[i - k] - lam[i]) / h for k in range(1, o)])
        b[: len(predicted)] += predicted
        rows.append(_row(t, s / t, b.tolist()))
    return SolverTable("unipc", order + 1, "x0", tuple(rows))
