"""docs/theory.md, sections 6 and 7: what the optimum's velocity does to the reward, and where theory stops."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from rewarded import Rewarded
from torch.func import grad, hessian, vmap

from nft_kernels import solver_step
from nft_kernels.solvers import schedule, table

close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
BETAS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
SOLVERS = {"euler": {}, "heun": {}, "dpm++2M": {}, "ddim": {"eta": 1.0}}


def derivatives(f, x, t):
    """Gradient (B, d), Laplacian (B,) and time derivative (B,) of a function of points (B, d) and a time."""
    t = torch.tensor(t)

    def one(y, t):
        return f(y[None], t)[0]

    return (
        vmap(lambda y: grad(one)(y, t))(x),
        vmap(lambda y: hessian(one)(y, t).trace())(x),
        vmap(lambda y: grad(one, argnums=1)(y, t))(x),
    )


def diffusion(t):
    """g^2 of the process dx = -x / (1-t) dt + g dw that noises x0 to (1-t) x0 + t eps."""
    return 2 * t / (1 - t)


def over(world, x, log_factor):
    """Probabilities on the evenly spaced points x (N, 1) of pi_old times the exponential of ``log_factor`` (..., N)."""
    return (world.old.log_density(x, 0.0) + log_factor).softmax(-1)


def tilted_reward(world, strength):
    """E[r] under pi_old exp(strength r), normalised."""
    x = torch.linspace(-6, 6, 4001)[:, None]
    r = world.alpha(x, 0.0)
    return over(world, x, strength * r) @ r


def reward_variance(world):
    x = torch.linspace(-6, 6, 4001)[:, None]
    r, p = world.alpha(x, 0.0), over(world, x, 0.0)
    return p @ r**2 - (p @ r) ** 2


def solved_reward(world, beta, solver):
    """E[r(x0)] of the solver's pictures under v*, as an integral over the noise instead of a mean of draws.

    Points of a grid move as the solver moves them, with the grid's Gaussian weights. Where a step draws noise, its
    Gaussian transition spreads the density over the grid anew; the last step to t = 0 never draws any.
    """
    grid = torch.linspace(-6, 6, 1001)[:, None]
    weights = (-(grid[:, 0] ** 2) / 2).softmax(0)
    x, history = grid, ()
    for i, row in enumerate(solver.rows):
        noise = torch.zeros_like(x) if row.c else None
        x, history, *_ = solver_step(
            solver, i, x, world.optimum(x, row.t, beta), history, noise=noise, backend="reference"
        )
        if row.c:
            weights = (-(((grid - x.T) / row.c) ** 2) / 2).softmax(0) @ weights
            x = grid
    return (weights @ world.alpha(x, 0.0)).item()


def test_alpha_drifts_upwards_under_the_optimum(space, noised, t):
    """The generator of the backward process; a martingale under the old policy, a submartingale under any beta."""
    x, g2 = noised(space.old), diffusion(t)
    slope, laplacian, change = derivatives(space.alpha, x, t)

    def drift(v):
        backward = v + g2 / (2 * t) * (x + (1 - t) * v)
        return -change - (backward * slope).sum(1) + g2 / 2 * laplacian

    close(drift(space.old.velocity(x, t)), torch.zeros(len(x)))
    for beta in (0.3, 1.0, 5.0):
        close(drift(space.optimum(x, t, beta)), 2 / beta * g2 * slope.square().sum(1))


def test_the_rise_adds_up_to_the_variance_of_the_reward(line):
    x = torch.linspace(-8, 8, 4001)[:, None]
    rise = 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(60), strict=True):
        t = (1 + node) / 2
        y = x.clone().requires_grad_()
        slope = torch.autograd.grad(line.alpha(y, t).sum(), y)[0][:, 0]
        rise += weight / 2 * diffusion(t) * (line.old.log_density(x, t).softmax(0) @ slope**2)
    close(rise, reward_variance(line))


def log_tilt(world, x, t, strength):
    """log E[exp(strength r(x0)) | x_t = x] as a sum over a grid of x0, (B,)."""
    x0 = torch.linspace(-8, 8, 4001)[:, None]
    joint = world.old.log_density(x0, 0.0) - (x - (1 - t) * x0.T) ** 2 / (2 * t * t)
    return (joint + strength * world.alpha(x0, 0.0)).logsumexp(1) - joint.logsumexp(1)


def test_the_optimum_is_the_tilt_to_first_order(line, noised, t):
    x, at = noised(line.old), partial(torch.full, (6,))

    def cumulant(strength):
        return log_tilt(line, x, t, strength[:, None])

    first = grad(lambda s: cumulant(s).sum())
    close(first(at(0.0)), line.alpha(x, t))
    x0 = torch.linspace(-8, 8, 4001)[:, None]
    given = (line.old.log_density(x0, 0.0) - (x - (1 - t) * x0.T) ** 2 / (2 * t * t)).softmax(1)
    r = line.alpha(x0, 0.0)
    close(grad(lambda s: first(s).sum())(at(0.0)), given @ r**2 - (given @ r) ** 2)


def test_only_the_tilt_is_one_diffusion(line, t):
    """The Fokker-Planck equation in logarithms; pi_old exp(s alpha) has the score of v*."""
    x, g2, strength = torch.linspace(-2, 2.5, 10)[:, None], diffusion(t), 2.0

    def residual(log_p):
        slope, laplacian, change = derivatives(log_p, x, t)
        spread = (x.shape[1] + (x * slope).sum(1)) / (1 - t)
        return change - spread - g2 / 2 * (laplacian + slope.square().sum(1))

    old, slope = line.old.log_density, derivatives(line.alpha, x, t)[0]
    close(residual(old), torch.zeros(len(x)))
    close(residual(lambda x, t: old(x, t) + log_tilt(line, x, t, strength)), torch.zeros(len(x)))
    gap = residual(lambda x, t: old(x, t) + strength * line.alpha(x, t))
    close(gap, -(strength**2) * g2 / 2 * slope.square().sum(1))
    assert gap.abs().max() > 1e-3


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("r", [(0.2, 0.5, 0.9), (0.3, 0.8, 0.1)])
def test_reward_grows_under_every_solver_as_beta_shrinks(line, name, r):
    world, solver = Rewarded(line.old, torch.tensor(r)), table(name, schedule(20), **SOLVERS[name])
    old = solved_reward(world, math.inf, solver)
    rewards = [solved_reward(world, beta, solver) for beta in BETAS]
    assert all(after > before for before, after in pairwise([old, *rewards])), rewards
    tilt = [tilted_reward(world, 2 / beta) for beta in (math.inf, *BETAS)]
    # Weak guidance gains what the tilt gains, but for the error of 20 steps.
    assert rewards[0] - old == pytest.approx((tilt[1] - tilt[0]).item(), rel=0.05)


def test_reward_under_stochastic_ddim_rises_as_under_the_tilt_by_its_variance(line):
    strength, variance = 1e-4, reward_variance(line)
    close(grad(lambda s: tilted_reward(line, s))(torch.tensor(0.0)), variance)

    def slope(steps):
        solver = table("ddim", schedule(steps), eta=1.0)
        up, down = (solved_reward(line, sign * 2 / strength, solver) for sign in (1, -1))
        return (up - down) / (2 * strength)

    slopes = [slope(steps) for steps in (16, 32, 64)]
    errors = [abs(s - variance) for s in slopes]
    assert errors[0] > errors[1] > errors[2]
    # Extrapolated to infinitely many steps, without the terms in 1 / steps and its square.
    assert (slopes[0] - 6 * slopes[1] + 8 * slopes[2]) / 3 == pytest.approx(variance.item(), rel=3e-3)
