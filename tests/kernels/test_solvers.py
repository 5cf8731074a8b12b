"""Solver tables and solver_step, on distributions whose velocity and flow are known in closed form."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch

from nft_kernels import add_noise, solver_step
from nft_kernels.solvers import SOLVERS, Row, SolverTable, dynamic_shift, schedule, shifted, table

# Every solver in every order it has.
ALL = [(name, {}) for name in SOLVERS if name not in ("deis", "unipc")]
ALL += [(name, {"order": order}) for name in ("deis", "unipc") for order in (1, 2, 3)]
DETERMINISTIC = [(name, options) for name, options in ALL if not table(name, (1.0, 0.5, 0.0), **options).stochastic]
SDES = [("flow-sde", {}), ("dance-sde", {}), ("dance-sde", {"eta": 1.0}), ("ddim", {"eta": 1.0})]

# A mixture of two Gaussians in one dimension.
SHARE = torch.tensor([0.3, 0.7], dtype=torch.float64)
MEAN = torch.tensor([-1.5, 0.8], dtype=torch.float64)
DEVIATION = torch.tensor([0.4, 0.6], dtype=torch.float64)
POINTS = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)


def velocity(x, t):
    variance = ((1 - t) * DEVIATION) ** 2 + t * t
    distance = x.double()[..., None] - (1 - t) * MEAN
    posterior = (SHARE.log() - variance.log() / 2 - distance**2 / (2 * variance)).softmax(-1)
    x0 = MEAN + (1 - t) * DEVIATION**2 * distance / variance
    return (posterior * (t * distance / variance - x0)).sum(-1)


def transport(x1, t):
    """The exact flow from t = 1: in one dimension it keeps every point's quantile."""

    def cdf(x, t):
        variance = ((1 - t) * DEVIATION) ** 2 + t * t
        return (SHARE * torch.special.ndtr((x[..., None] - (1 - t) * MEAN) / variance.sqrt())).sum(-1)

    wanted, low, high = cdf(x1, 1.0), torch.full_like(x1, -12), torch.full_like(x1, 12)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, t) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def solve(solver, x, model=velocity, **options):
    history = ()
    for i, t in enumerate(solver.times):
        x, history, *_ = solver_step(solver, i, x, model(x, t), history, **options)
    return x


# Parity with diffusers. Its schedulers are given our sigmas, so that only the update is compared. Settings under which
# they agree: use_flow_sigmas and prediction_type="flow_prediction"; lower_order_final with fewer than 15 steps, where
# it lowers both the last step and the last but one; for DPM-Solver++ algorithm_type "dpmsolver++" and solver_type
# "midpoint"; for UniPC solver_type "bh2" and predict_x0; for DEIS a last sigma above 0, where its formula has no limit.
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
DPM = FLOW | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
TO_ZERO = [0.97, 0.9, 0.8, 0.66, 0.5, 0.33, 0.12, 0.0]
FROM_ONE = [1.0, *TO_ZERO]
ABOVE_ZERO = TO_ZERO[:-1]


@pytest.mark.parametrize(
    ("name", "options", "scheduler", "settings", "sigmas", "tolerance"),
    [
        # These two and DPM-Solver++ compute in float32 whatever they are given.
        ("euler", {}, "FlowMatchEulerDiscreteScheduler", {}, FROM_ONE, 1e-6),
        ("heun", {}, "FlowMatchHeunDiscreteScheduler", {}, FROM_ONE, 2e-6),
        ("dpm++1", {}, "DPMSolverMultistepScheduler", {**DPM, "solver_order": 1}, FROM_ONE, 2e-6),
        ("dpm++2M", {}, "DPMSolverMultistepScheduler", {**DPM, "solver_order": 2}, FROM_ONE, 2e-6),
        ("dpm++3M", {}, "DPMSolverMultistepScheduler", {**DPM, "solver_order": 3}, FROM_ONE, 2e-6),
        ("dpm++3M", {}, "DPMSolverMultistepScheduler", {**DPM, "solver_order": 3}, TO_ZERO, 2e-6),
        ("unipc", {"order": 1}, "UniPCMultistepScheduler", {**FLOW, "solver_order": 1}, TO_ZERO, 1e-12),
        ("unipc", {"order": 2}, "UniPCMultistepScheduler", {**FLOW, "solver_order": 2}, TO_ZERO, 1e-12),
        ("unipc", {"order": 3}, "UniPCMultistepScheduler", {**FLOW, "solver_order": 3}, TO_ZERO, 1e-12),
        ("deis", {"order": 1}, "DEISMultistepScheduler", {**FLOW, "solver_order": 1}, ABOVE_ZERO, 1e-12),
        ("deis", {"order": 2}, "DEISMultistepScheduler", {**FLOW, "solver_order": 2}, ABOVE_ZERO, 1e-12),
        ("deis", {"order": 3}, "DEISMultistepScheduler", {**FLOW, "solver_order": 3}, ABOVE_ZERO, 1e-12),
    ],
)
def test_parity_with_diffusers(name, options, scheduler, settings, sigmas, tolerance):
    theirs = getattr(diffusers, scheduler)(**settings)
    theirs.set_timesteps(len(sigmas) - 1)
    theirs.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    theirs.timesteps = theirs.sigmas[:-1] * 1000
    times = sigmas[:-1]
    if name == "heun":
        times = [sigmas[0], *np.repeat(sigmas[1:-1], 2).tolist()]
        theirs.sigmas = torch.tensor([*times, 0.0], dtype=torch.float64)
        theirs.timesteps = theirs.sigmas[:-1] * 1000
    theirs.set_begin_index(0)
    expected = POINTS[:, None]
    for t, timestep in zip(times, theirs.timesteps, strict=True):
        expected = theirs.step(velocity(expected, t), timestep, expected, return_dict=False)[0]
    got = solve(table(name, sigmas, **options), POINTS[:, None])
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_schedules_of_diffusers():
    for shift in (1.0, 3.0):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        theirs.set_timesteps(9)
        ours = schedule(9, shift=shift, last=shifted(0.001, shift))
        np.testing.assert_allclose(ours, theirs.sigmas, rtol=2e-6)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    theirs.set_timesteps(sigmas=[1.0, 0.7, 0.2], mu=calculate_shift(1024))
    np.testing.assert_allclose([shifted(t, dynamic_shift(1024)) for t in (1.0, 0.7, 0.2, 0.0)], theirs.sigmas, 2e-6)
    assert schedule(4) == schedule(np.int64(4), shift=np.float32(1)) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert dynamic_shift(np.int64(1024)) == dynamic_shift(1024)
    # Beside 1 a solver would have no limit, and flow-sde's noise no bound.
    assert all(schedule(4, shift=shift)[0] == 1 for shift in (0.1, 0.3, 0.37, 3.0, 7.3))


@pytest.mark.parametrize(("name", "options"), DETERMINISTIC, ids=str)
def test_order_of_convergence(name, options):
    """Between 0.85 and 0.15; order 3 and above shows in the error of one row, as the first and last step are Euler."""
    start, exact = transport(POINTS, 0.85), transport(POINTS, 0.15)
    errors = [
        (solve(table(name, [0.85 - 0.7 * k / n for k in range(n + 1)], **options), start) - exact).abs().mean()
        for n in (40, 80)
    ]
    order = table(name, (1.0, 0.0), **options).order
    assert math.log2(errors[0] / errors[1]) > min(order, 2) - 0.1
    if name == "heun":
        return
    errors = []
    for h in (0.01, 0.005):
        sigmas = [0.5 + (4 - k) * h for k in range(10)]
        solver, i = table(name, sigmas, **options), 4
        past = []
        for k in range(i, -1, -1):
            x, (p, q) = transport(POINTS, sigmas[k]), solver.prediction(k)
            past.append(p * x + q * velocity(x, sigmas[k]))
        row = solver.rows[i]
        moved = row.a * transport(POINTS, row.t) + sum(b * y for b, y in zip(row.b, past, strict=False))
        errors.append((moved - transport(POINTS, sigmas[i + 1])).abs().mean())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.parametrize(
    ("name", "order", "weights"),
    [
        ("dpm++3M", None, (22 / 12, -14 / 12, 4 / 12)),  # without the half of its second difference
        ("deis", 3, (23 / 12, -16 / 12, 5 / 12)),
        ("unipc", 2, (23 / 12, -16 / 12, 5 / 12)),
        ("unipc", 3, (55 / 24, -59 / 24, 37 / 24, -9 / 24)),
    ],
)
def test_between_nearly_equal_times_they_are_adams_bashforth(name, order, weights):
    times = [0.5 - 1e-7 * i for i in range(8)]
    row = table(name, times, **({} if order is None else {"order": order})).rows[4]
    np.testing.assert_allclose(np.array(row.b) / sum(row.b), weights, rtol=1e-5)
    # Of h = x - t v or x + (1-t) v, the part of v makes Euler's step.
    push = 1 - row.t if name == "deis" else -row.t
    assert sum(row.b) * push == pytest.approx(times[5] - times[4], rel=1e-9)


@pytest.mark.parametrize(("name", "options"), [*SDES, ("cps", {}), ("mixed", {})], ids=str)
def test_variance_of_one_step(name, options):
    """Where x0 is known, a step must leave x = (1-s) x0 + s eps: exactly when re-noising, to first order in an SDE."""
    t, x0 = 0.6, 1.7
    for s, tolerance in ((0.55, 3e-2), (0.59, 1e-3)):
        row = table(name, (t, s), **({"window": (0, 1)} if name == "mixed" else {}) | options).rows[0]
        # x = (1-t) x0 + t eps and v = eps - x0 have the variances t^2 and 1, and are correlated.
        mean = row.a * (1 - t) * x0 + row.b[0] * -x0
        deviation = math.hypot(row.a * t + row.b[0], row.c)
        exact = name in ("ddim", "cps")
        assert mean == pytest.approx((1 - s) * x0, abs=1e-12 if exact else tolerance)
        assert deviation == pytest.approx(s, abs=1e-12 if exact else tolerance)


@pytest.mark.parametrize(("name", "options"), SDES, ids=str)
def test_sde_marginals_of_a_gaussian(name, options):
    """Mean and variance follow a linear recursion, so no sampling is needed; they approach the data's at rate 1/n.

    From 0.9 on: Flow-GRPO's step from t = 1 errs by an amount that later steps only forget at rate n^-eta^2.
    """
    mean0, variance0 = 0.7, 0.25

    def marginal(t):
        return (1 - t) * mean0, (1 - t) ** 2 * variance0 + t * t

    def error(n):
        mean, variance = marginal(0.9)
        for row in table(name, [0.9 - 0.8 * k / n for k in range(n + 1)], **options).rows:
            centre, total = marginal(row.t)
            slope = (row.t - (1 - row.t) * variance0) / total
            factor = row.a + row.b[0] * slope
            mean = factor * mean + row.b[0] * (-mean0 - slope * centre)
            variance = factor**2 * variance + row.c**2
        return sum(abs(a - b) for a, b in zip((mean, variance), marginal(0.1), strict=True))

    assert error(1600) < 1e-3
    assert error(400) / error(1600) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("name", "options"), [*SDES, ("mixed", {"window": (10, 40)})], ids=str)
def test_sde_samples_have_the_moments_of_the_ode(name, options):
    x = add_noise(torch.zeros(10, 600), torch.ones(10), seed=1).double()
    got = solve(table(name, schedule(80), **options), x, seed=2).flatten()
    exact = transport(x.flatten(), 0.0)
    assert abs(got.mean() - exact.mean()) < 0.06
    assert abs(got.std() - exact.std()) < 0.06
    assert abs(((got - got.mean()) ** 3).mean() - ((exact - exact.mean()) ** 3).mean()) < 0.15


def _by_score(x, v, t, s, g):
    """Mean of an Euler-Maruyama step of the reverse SDE, written with the score -E[eps] / t as the publications do."""
    score = -(x + (1 - t) * v) / t
    return x + (v - g**2 / 2 * score) * (s - t), g * math.sqrt(t - s)


def _flow_grpo(x, v, t, s, first, eta=0.7):
    # arXiv 2505.05470, and its code's replacement of 1 - t in the first step.
    return _by_score(x, v, t, s, eta * math.sqrt(t / (1 - (first if t == 1 else t))))


def _dance_grpo(x, v, t, s, first, eta=0.3):
    # arXiv 2505.07818.
    return _by_score(x, v, t, s, eta)


def _cps(x, v, t, s, first, eta=0.7):
    # arXiv 2509.05952.
    x0, eps = x - t * v, x + (1 - t) * v
    return (1 - s) * x0 + s * math.cos(eta * math.pi / 2) * eps, s * math.sin(eta * math.pi / 2)


def _ddim(x, v, t, s, first, eta=1.0):
    # arXiv 2010.02502, equations 12 and 16, for the variance-preserving process that x / n is on.
    n, m = math.hypot(1 - t, t), math.hypot(1 - s, s)
    alpha, after = ((1 - t) / n) ** 2, ((1 - s) / m) ** 2
    sigma = eta * math.sqrt((1 - after) / (1 - alpha) * (1 - alpha / after))
    eps = x + (1 - t) * v
    x0 = (x / n - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha) if t < 1 else x - v
    return m * (math.sqrt(after) * x0 + math.sqrt(1 - after - sigma**2) * eps), m * sigma


@pytest.mark.parametrize(
    ("name", "formula", "eta"),
    [("flow-sde", _flow_grpo, 0.7), ("dance-sde", _dance_grpo, 0.3), ("cps", _cps, 0.7), ("ddim", _ddim, 1.0),
     ("ddim", _ddim, 0.4)],
)  # fmt: skip
def test_stochastic_solvers_step_by_step_as_published(name, formula, eta):
    """A whole trajectory in float64, with the same noise."""
    sigmas = schedule(10, shift=3.0)
    solver = table(name, sigmas, eta=eta)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, dtype=torch.float64, generator=generator)
    for i, (t, s) in enumerate(itertools.pairwise(sigmas)):
        v = velocity(x, t)
        z = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        mean, deviation = formula(x, v, t, s, sigmas[1], eta)
        got = solver_step(solver, i, x, v, noise=z, backend="reference").x
        torch.testing.assert_close(got, mean + deviation * z, rtol=1e-12, atol=1e-12)
        x = got


@pytest.mark.parametrize("name", ["flow-sde", "dance-sde"])
def test_sde_without_noise_is_euler(name):
    sigmas = schedule(5, shift=3.0)
    assert [row.b for row in table(name, sigmas, eta=0.0).rows] == [row.b for row in table("euler", sigmas).rows]


def test_flow_sde_starts_as_flow_grpo_does():
    row = table("flow-sde", (1.0, 0.9, 0.0), eta=0.5).rows[0]
    deviation = 0.5 * math.sqrt(1 / (1 - 0.9))
    assert row.c == pytest.approx(deviation * math.sqrt(0.1))
    assert (row.a, *row.b) == pytest.approx((1 - deviation**2 / 2 * 0.1, -0.1))


@pytest.mark.parametrize(("name", "options"), DETERMINISTIC, ids=str)
def test_straight_paths_are_exact_from_one_to_zero(name, options, backend):
    """Where x0 and eps are known every deterministic solver is exact: no limit is clamped, coefficients add up."""
    x0, eps = torch.randn(2, 3, 50, dtype=torch.float64)
    for sigmas in (schedule(1), schedule(2), schedule(7, shift=3.0), (1.0, 1 - 1e-9, 0.5, 1e-9, 0.0)):
        solver = table(name, sigmas, **options)
        assert all(math.isfinite(y) for row in solver.rows for y in (row.a, *row.b, row.c))
        got = solve(solver, eps, lambda x, t: eps - x0, backend=backend)
        # Beside t = 1 a prediction of the noise has lost x0 to cancellation.
        near = name == "deis" and len(sigmas) == 5
        assert (got - x0).abs().max() < (1e-5 if near else 1e-12)


@pytest.mark.parametrize(("name", "options"), ALL, ids=str)
def test_the_last_step_returns_a_perfect_prediction(name, options):
    if name in ("flow-sde", "dance-sde"):
        return  # Euler-Maruyama adds noise in its last step too
    solver = table(name, schedule(4, shift=3.0), **options)
    i = len(solver.rows) - 1
    x0, eps, *history = torch.randn(2 + solver.depth(i), 3, 50, dtype=torch.float64)
    t = solver.rows[i].t
    got = solver_step(solver, i, (1 - t) * x0 + t * eps, eps - x0, history).x
    assert (got - x0).abs().max() < 1e-13


def test_predictions_at_t_1_leave_the_interpolation():
    for order in (2, 3):
        solver = table("deis", schedule(8), order=order)
        assert [len(row.b) for row in solver.rows[:4]] == [1, 1, 2, order]
    assert len(table("dpm++2M", schedule(8)).rows[1].b) == 1


def layouts(dtype, count, kernels):
    """Tensors of several memory layouts, with more elements than one chunk or block of the kernel."""
    shape = (3, 4, 37, 17) if kernels == "native" else (2, 3, 23, 17)
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device(), dtype)

    def make(k):
        x = randn(*shape)
        if k % 4 == 1:
            return x.contiguous(memory_format=torch.channels_last)
        if k % 4 == 2:
            return randn(*shape[::-1]).permute(3, 2, 1, 0)
        if k % 4 == 3:
            return x[:1].expand(shape)
        return x

    return [make(k) for k in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", ["heun", "flow-sde", "dpm++3M", "deis", "unipc"])
def test_kernels_against_reference(name, guided, dtype, kernels):
    solver = table(name, schedule(6, shift=3.0))
    for i, row in enumerate(solver.rows):
        x, v, v_uncond, noise, *history = layouts(dtype, 4 + solver.depth(i), kernels)
        if i % 2:  # as in a rollout: the state is wider than the velocity
            x = x.float() if dtype != torch.float64 else x
        before = x.clone(), v.clone()

        def run(backend, cast, i=i, row=row, tensors=(x, v, v_uncond, noise), past=history):
            x, v, v_uncond, noise = map(cast, tensors)
            guidance = {"v_uncond": v_uncond, "guidance": 4.5} if guided else {}
            log_prob = row.c > 0
            past = [cast(h) for h in past]
            out = solver_step(
                solver, i, x, v, past, **guidance, noise=noise, x0=True, log_prob=log_prob, backend=backend
            )
            return [out.x, out.x0, *out.history, *([out.log_prob] if log_prob else [])]

        got, again = run(kernels, lambda y: y), run(kernels, lambda y: y)
        plain, exact = run("reference", lambda y: y), run("reference", lambda y: y.double())
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        assert torch.equal(x, before[0]) and torch.equal(v, before[1])
        for g, p, e in zip(got, plain, exact, strict=True):
            assert g.dtype == p.dtype
            ulp = torch.finfo(g.dtype).eps * e.abs().max() + torch.finfo(g.dtype).tiny
            assert (g.double() - e).abs().max() <= max(2 * (p.double() - e).abs().max(), 4 * ulp)


@pytest.mark.parametrize(("name", "options"), [*SDES, ("cps", {})], ids=str)
def test_log_probability_against_torch_distributions(name, options, backend):
    solver = table(name, schedule(5, shift=3.0), **options)
    x, v = torch.randn(2, 3, 7, 300, dtype=torch.float64)
    for i, row in enumerate(solver.rows):
        if row.c == 0:
            continue
        out = solver_step(solver, i, x, v, seed=5, log_prob=True, backend=backend)
        expected = torch.distributions.Normal(row.a * x + row.b[0] * v, row.c).log_prob(out.x).mean((1, 2))
        torch.testing.assert_close(out.log_prob, expected, rtol=1e-12, atol=1e-12)


def test_noise_depends_on_seed_and_step_only(backend):
    solver, seeds = table("flow-sde", schedule(6)), torch.tensor([3, -(2**62), 2**40 + 1])
    x = torch.zeros(3, 4, 700)

    def noise(i, x, seed):
        return solver_step(solver, i, x, torch.zeros_like(x), seed=seed, backend=backend).x / solver.rows[i].c

    whole = noise(2, x, seeds)
    assert torch.equal(whole, torch.cat([noise(2, x[k : k + 1], seeds[k : k + 1]) for k in range(3)]))
    assert torch.equal(whole, noise(2, x.transpose(1, 2).contiguous().transpose(1, 2), seeds))
    draws = [noise(i, x, seeds) for i in range(6)] + [add_noise(x, torch.ones(3), seed=seeds, backend=backend)]
    draws += [noise(0, x, 3)[1:]]
    off = torch.corrcoef(torch.cat([d.flatten(1) for d in draws])) - torch.eye(23)
    assert off.abs().max() < 5 / math.sqrt(2800)


def test_backends_draw_the_same_noise(kernels):
    solver, x, v = table("cps", schedule(6)), *torch.randn(2, 3, 1003)
    a, b = (solver_step(solver, 1, x, v, seed=-5, backend=name).x for name in ("reference", kernels))
    assert ((a - b).abs() <= 4 * torch.finfo(torch.float32).eps * a.abs().clamp_min(1)).all()


def test_guidance_of_one_is_no_guidance(backend):
    solver = table("dpm++2M", schedule(6))
    x, v, u, h = torch.randn(4, 2, 9, dtype=torch.float64)
    plain = solver_step(solver, 2, x, v, (h,), backend=backend)
    guided = solver_step(solver, 2, x, v, (h,), v_uncond=u, guidance=1.0, backend=backend)
    torch.testing.assert_close(plain.x, guided.x)
    strong = solver_step(solver, 2, x, v, (h,), v_uncond=u, guidance=7.0, x0=True, backend=backend)
    torch.testing.assert_close(strong.x, solver_step(solver, 2, x, u + 7 * (v - u), (h,), backend=backend).x)
    torch.testing.assert_close(strong.x0, x - solver.rows[2].t * (u + 7 * (v - u)))
    assert strong.history[0] is strong.x0


@pytest.mark.parametrize("name", ["heun", "dpm++2M", "deis"])
def test_the_history_is_of_guided_velocities(name, backend):
    """Whatever it holds: of velocities, too, it must not be what the model gave before guidance."""
    solver, x = table(name, schedule(4)), POINTS[None]
    base, scale = 0.3 * POINTS.sin()[None], 4.0
    expected = solve(solver, x, lambda x, t: base + scale * (velocity(x, t) - base), backend=backend)
    guided = solve(solver, x, v_uncond=base, guidance=scale, backend=backend)
    torch.testing.assert_close(guided, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("terms", range(1, 9))
def test_a_row_uses_all_its_terms(terms, backend):
    """More than any solver of ours has: a table of one's own may have eight."""
    weights = tuple(0.1 * (j + 2) for j in range(terms))
    plain = tuple(Row(1 - i / 10, 1.0, (1.0,)) for i in range(terms - 1))
    solver = SolverTable("long", 1, "velocity", (*plain, Row(0.05, 0.7, weights)))
    x, *h = torch.randn(terms + 1, 2, 1100, dtype=torch.float64)
    out = solver_step(solver, terms - 1, x, h[0], h[1:], backend=backend)
    expected = 0.7 * x + sum(weight * each for weight, each in zip(weights, h, strict=True))
    torch.testing.assert_close(out.x, expected, rtol=1e-12, atol=1e-12)


def test_history_is_as_short_as_the_rows_to_come_allow():
    x = torch.zeros(1, 2)
    for name, most in (("euler", 0), ("heun", 1), ("dpm++2M", 1), ("dpm++3M", 2), ("unipc", 2)):
        solver = table(name, schedule(8))
        assert max(solver.depth(i) for i in range(len(solver.rows))) == most
        assert solver.depth(0) == solver.depth(len(solver.rows)) == 0
    solver = SolverTable("gap", 1, "velocity", (Row(1.0, 1.0, (1.0,)), Row(0.9, 1.0, (1.0,)), Row(0.8, 1.0, (0, 0, 1))))
    assert [solver.depth(i) for i in range(4)] == [0, 1, 2, 0]
    torch.testing.assert_close(solve(solver, x, torch.full_like), torch.full_like(x, 1.0 + 0.9 + 1.0))


def test_compiles_and_passes_opcheck(backend):
    solver, (x, v, h) = table("dpm++2M", schedule(5)), torch.randn(3, 2, 9)

    def run(x, v):
        return solver_step(solver, 3, x, v, (h,), backend=backend).x

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x, v), run(x, v))
    seeds = torch.arange(2)
    coefficients = (0.9, [0.1, 0.2], 0.3, 1.0, -0.5, 0.5, 4.0)
    args = (x, v, v + 1, None, [h], seeds, seeds, *coefficients, True, True, True, backend)
    torch.library.opcheck(torch.ops.nft_kernels.solver_step.default, args)


STEP = (table("flow-sde", schedule(4)), 1, torch.zeros(2, 3), torch.zeros(2, 3))
MULTI = (table("dpm++2M", schedule(4)), 2, torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: table("rk4", (1.0, 0.0)), ValueError, "name: got 'rk4', accepted are euler, heun"),
        (lambda: table("euler", ()), ValueError, "sigmas: got"),
        (lambda: table("euler", (0.5, 0.5)), ValueError, "sigmas: got"),
        (lambda: table("euler", (1.1, 0.5)), ValueError, "sigmas: got"),
        (lambda: table("euler", (1.0, float("nan"))), ValueError, "sigmas: got"),
        (lambda: table("deis", (1.0, 0.0), order=4), ValueError, "order: got 4"),
        (lambda: table("flow-sde", (1.0, 0.0), eta=-1.0), ValueError, "eta: got -1"),
        (lambda: table("ddim", (1.0, 0.0), eta=1.5), ValueError, "eta: got 1.5"),
        (lambda: table("ddim", (1.0, 0.0), eta=True), ValueError, "eta: got True, accepted is a number in"),
        (lambda: table("cps", (1.0, 0.0), eta="1"), ValueError, "eta: got '1'"),
        (lambda: table("flow-sde", (1.0, 0.0), eta=math.inf), ValueError, "eta: got inf"),
        (lambda: table("flow-sde", (1.0, 0.0), eta=10**400), ValueError, "eta: got 10000"),
        (lambda: table("flow-sde", (1.0, 0.5), eta=1e30), ValueError, "options: got Row.* that float32 holds"),
        (lambda: table("ddim", (1.0, 0.5), eta=1e-40), ValueError, "options: got Row.* that float32 holds"),
        (lambda: table("unipc", (1.0, 0.0), order=True), ValueError, "order: got True, accepted are 1, 2, 3"),
        (lambda: table("deis", (1.0, 0.0), order=2.0), ValueError, "order: got 2.0, accepted are 1, 2, 3"),
        (lambda: table(["euler"], (1.0, 0.0)), ValueError, r"name: got \['euler'\], accepted are euler"),
        (lambda: table("euler", "10"), TypeError, "sigmas: got '10', accepted are strictly falling times"),
        (lambda: dynamic_shift(10**7), ValueError, "tokens: got 10000000, accepted are numbers up to"),
        (lambda: table("mixed", (1.0, 0.0), window=(0, 2)), ValueError, "window: got"),
        (lambda: table("mixed", (1.0, 0.0), window={0: 1, 1: 1}), ValueError, "window: got {0: 1, 1: 1}, accepted"),
        (lambda: table("mixed", (1.0, 0.0), window=1), ValueError, "window: got 1, accepted are two integers"),
        (lambda: table("mixed", (1.0, 0.0), window=[0.5, 1]), ValueError, r"window: got \[0.5, 1\], accepted"),
        (lambda: table("mixed", (1.0, 0.0), sde="euler"), ValueError, "sde: got 'euler'"),
        (lambda: table("euler", (1.0, 0.0), eta=1.0), TypeError, "eta: unknown option of euler, accepted are none"),
        (lambda: table("mixed", (1.0, 0.0), Etta=1.0), TypeError, "Etta: unknown option of mixed, did you mean eta"),
        (lambda: table("deis", (1.0, 0.0), x=1), TypeError, "x: unknown option of deis, accepted are order"),
        (lambda: table("euler", None), TypeError, "sigmas: got None, accepted are strictly falling times"),
        (lambda: table("euler", [1, "a"]), TypeError, r"sigmas: got \[1, 'a'\], accepted are"),
        (lambda: SolverTable("a", 1, "v", (Row(1.0, 1.0, (1.0,)),)), ValueError, "history: got 'v' of a, accepted are"),
        *(
            (lambda row=row: SolverTable("a", 1, "x0", (row,)), ValueError, "rows: got Row.* as row 0 of a, accepted")
            for row in (
                Row(5.0, 1.0, (1.0,)),
                Row(1.0, 1.0, ()),
                Row(1.0, 1.0, (1.0, 1.0)),
                Row(1.0, 1.0, (1.0,), -1.0),
                Row(1.0, 1.0, (float("nan"),)),
            )
        ),
        (lambda: schedule(0), ValueError, "steps: got 0"),
        (lambda: schedule("10"), ValueError, "steps: got '10', accepted are positive integers"),
        (lambda: schedule(2.5), ValueError, "steps: got 2.5"),
        (lambda: schedule(True), ValueError, "steps: got True"),
        (lambda: schedule(4, shift="3"), ValueError, "shift: got '3', accepted are positive"),
        (lambda: schedule(4, last="a"), ValueError, "last: got 'a', accepted is a number between"),
        (lambda: shifted(0.5, -3), ValueError, "shift: got -3"),
        (lambda: dynamic_shift("a"), ValueError, "tokens: got 'a'"),
        (lambda: schedule(3, shift=0.0), ValueError, "shift: got 0"),
        (lambda: schedule(3, last=1.0), ValueError, "last: got 1"),
        (lambda: solver_step("euler", *STEP[1:]), TypeError, "table: got str"),
        (lambda: solver_step(STEP[0], 4, *STEP[2:]), ValueError, "i: got 4, accepted are rows 0 to 3"),
        (lambda: solver_step(STEP[0], 1.0, *STEP[2:]), TypeError, "i: got float"),
        (lambda: solver_step(*STEP), ValueError, "seed, noise: got neither"),
        (lambda: solver_step(*STEP, seed=1, noise=torch.zeros(2, 3)), ValueError, "seed, noise: got both"),
        (lambda: solver_step(*STEP, seed=torch.zeros(3).long()), ValueError, "seed: got torch.int64 of shape"),
        (lambda: solver_step(*STEP, noise=torch.zeros(2, 4)), ValueError, "noise: got shape .* the shape of x = "),
        (lambda: solver_step(*STEP[:3], torch.zeros(3, 2), seed=1), ValueError, "v: got shape"),
        (lambda: solver_step(*STEP[:3], torch.zeros(2, 3).long(), seed=1), TypeError, "v: got torch.int64"),
        (lambda: solver_step(*STEP, seed=1, guidance=2.0), ValueError, "v_uncond, guidance: got one"),
        (lambda: solver_step(*STEP, seed=1, v_uncond=torch.zeros(2, 3), guidance="a"), TypeError, "guidance: got str"),
        (lambda: solver_step(*MULTI, None), TypeError, "history: got NoneType, accepted is what the step before"),
        (lambda: solver_step(*STEP, seed=1, x0=3), TypeError, "x0: got 3, accepted are True and False"),
        (lambda: solver_step(*STEP, seed=1, log_prob=None), TypeError, "log_prob: got None, accepted are"),
        (lambda: solver_step(*MULTI), ValueError, "history: got 0 tensors, accepted are the 1 that row 1 returned"),
        (lambda: solver_step(*MULTI, [torch.zeros(2, 4)]), ValueError, r"history\[0\]: got shape"),
        (lambda: solver_step(*MULTI, [torch.zeros(2, 3)], log_prob=True), ValueError, "log_prob: got True"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("sde", ["flow-sde", "dance-sde", "cps"])
def test_mixed_steps_are_those_of_its_parts(sde):
    """No noise is as much a choice as any other amount."""
    times = schedule(5, shift=3.0)
    ode = table("euler", times).rows
    for eta in (None, 0.0, 0.4):
        options = {} if eta is None else {"eta": eta}
        noisy, mixed = table(sde, times, **options).rows, table("mixed", times, window=(1, 3), sde=sde, **options).rows
        assert mixed == (ode[0], *noisy[1:3], *ode[3:])


@pytest.mark.parametrize("short", [np.float16, np.float32])
def test_coefficients_are_float64_whatever_the_options_are(short):
    eta, shift = short(0.3), short(1.7)
    assert table("ddim", schedule(5), eta=eta) == table("ddim", schedule(5), eta=float(eta))
    assert schedule(5, shift=shift) == schedule(5, shift=float(shift))
    assert {type(x) for row in table("ddim", schedule(5), eta=eta).rows for x in (row.a, *row.b, row.c)} == {float}
