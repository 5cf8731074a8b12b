"""docs/theory.md, sections 1 to 5: the split of the old policy, the loss' optimum, and the scores, to 1e-10."""

from functools import partial

import pytest
import torch

from nft_kernels import nft_loss

M = 5.0
close = partial(torch.testing.assert_close, rtol=0, atol=1e-10)
loss_of = partial(nft_loss, adv_clip_max=M, backend="reference")


def score(mixture, x, t):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(mixture.log_density(x, t).sum(), x)[0]


def predicted(v, x, t, prediction):
    """What a model of that kind puts out where the velocity is v."""
    return {"v": v, "x0": x - t * v, "eps": x + (1 - t) * v}[prediction]


def outcomes(world, x, t):
    """x0 of every x_t, their probabilities and their r, with the first two moments of every component's posterior."""
    mean, variance = world.old.clean(x, t)
    d = x.shape[1]
    offsets = torch.diag_embed((d * variance).sqrt())
    x0 = mean[..., None, :] + torch.cat([offsets, -offsets], 1)
    probability = (world.old.posterior(x, t) / (2 * d))[..., None].expand(x0.shape[:-1])
    r = world.r[:, None].expand(x0.shape[:-1])
    return x0.reshape(-1, d), probability.reshape(-1), r.reshape(-1)


def expected_loss(v_theta, v_old, world, x, t, v_ref=None, **options):
    """The sum over x of E[loss | x_t = x]."""
    x0, probability, r = outcomes(world, x, t)
    v_theta, v_old, v_ref, x = (
        None if y is None else y.repeat_interleave(len(x0) // len(x), 0) for y in (v_theta, v_old, v_ref, x)
    )
    options |= {"v_ref": v_ref, "sample_weight": probability, "reduction": "sum"}
    return loss_of(v_theta, v_old, x, x0, torch.full((len(x0),), t), r, **options).loss


def minimise(loss, start):
    v = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [v], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = loss(v)
        value.backward()
        return value

    optimizer.step(closure)
    return v.detach()


def test_velocity_is_the_mean_of_eps_minus_x0_and_alpha_that_of_r(line, noised, t):
    x, x0 = noised(line.old), torch.linspace(-10, 10, 8001)
    eps = (x - (1 - t) * x0) / t
    joint = (line.old.log_density(x0[:, None], 0.0) - eps**2 / 2).exp()
    joint /= joint.sum(1, keepdim=True)
    close(line.old.velocity(x, t)[:, 0], (joint * (eps - x0)).sum(1))
    # As a function of x0, the probability that it is one of pi+.
    r = line.mean * (line.positive.log_density(x0[:, None], 0.0) - line.old.log_density(x0[:, None], 0.0)).exp()
    close(line.alpha(x, t), (joint * r).sum(1))


def test_velocity_and_score_name_the_same_field(space, noised, t):
    x = noised(space.old)
    close(score(space.old, x, t), -(x + (1 - t) * space.old.velocity(x, t)) / t)


def test_old_policy_is_the_mixture_of_its_good_and_bad_halves(space, noised, t):
    for time in (0.0, t):
        x = noised(space.old)
        positive, negative, old = (p.log_density(x, time).exp() for p in (space.positive, space.negative, space.old))
        close(space.mean * positive + (1 - space.mean) * negative, old)
        close(space.alpha(x, time), space.mean * positive / old)


def test_old_velocity_is_the_mixture_of_both_velocities(space, noised, t):
    x = noised(space.old)
    alpha = space.alpha(x, t)[:, None]
    positive, negative = space.positive.velocity(x, t), space.negative.velocity(x, t)
    close(alpha * positive + (1 - alpha) * negative, space.old.velocity(x, t))


def test_both_forms_of_delta(space, noised, t):
    x = noised(space.old)
    alpha, old = space.alpha(x, t)[:, None], space.old.velocity(x, t)
    close((1 - alpha) * (old - space.negative.velocity(x, t)), space.delta(x, t))
    close(alpha * (space.positive.velocity(x, t) - old), space.delta(x, t))


@pytest.mark.parametrize("prediction", ["v", "x0", "eps"])
@pytest.mark.parametrize("weighting", ["none", "t", "t2", "1/t", "1/t2", "(1-t)/t2"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_minimising_the_loss_finds_the_optimum(space, noised, t, prediction, weighting, beta):
    x = noised(space.old)
    old = predicted(space.old.velocity(x, t), x, t, prediction)
    options = {"beta": beta, "weighting": weighting, "prediction": prediction}
    found = minimise(lambda v: expected_loss(v, old, space, x, t, **options), old)
    alpha = space.alpha(x, t)[:, None]
    optimum = space.old.velocity(x, t) + 2 / beta * alpha * (space.positive.velocity(x, t) - space.old.velocity(x, t))
    close(found, predicted(optimum, x, t, prediction))
    close(space.optimum(x, t, beta), optimum)


def test_the_kl_term_pulls_the_optimum_to_the_reference(space, noised, t):
    x, beta, kl_weight = noised(space.old), 0.7, 0.4
    old = space.old.velocity(x, t)
    reference = old + torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    options = {"beta": beta, "weighting": "none", "v_ref": reference, "kl_weight": kl_weight}
    found = minimise(lambda v: expected_loss(v, old, space, x, t, **options), old)
    stiffness = M * beta * t**2
    close(found, (stiffness * space.optimum(x, t, beta) + kl_weight * reference) / (stiffness + kl_weight))


def test_adaptive_weights_put_a_kind_of_median_in_the_mean_s_place(space, noised, t):
    """Weiszfeld's iteration for beta d = sum p y / |y - beta d|_1 / sum p / |y - beta d|_1 over y = +g or -g."""
    x, beta = noised(space.old, 1), 0.8
    old = space.old.velocity(x, t)
    x0, probability, r = outcomes(space, x, t)
    g = (x - x0) / t - old
    y, share = torch.cat([g, -g]), torch.cat([probability * r, probability * (1 - r)])
    mean = share @ y
    close(mean[None], 2 * space.delta(x, t))
    median = mean
    for _ in range(500):
        weight = share / (y - median).abs().sum(1)
        median = weight @ y / weight.sum()
    v = (old + median / beta).requires_grad_()
    expected_loss(v, old, space, x, t, beta=beta).backward()
    close(v.grad, torch.zeros_like(v))
    assert (median - mean).norm() > 0.05 * mean.norm()


def test_adaptive_weights_of_one_element_make_it_the_median(line, noised, t):
    x, beta = noised(line.old, 1), 0.8
    old = line.old.velocity(x, t)
    x0, probability, r = outcomes(line, x, t)
    g = ((x - x0) / t - old)[:, 0]
    y, order = torch.cat([g, -g]).sort()
    share = torch.cat([probability * r, probability * (1 - r)])[order].cumsum(0)
    median = y[torch.searchsorted(share, 0.5)]
    for side in (-1, 1):
        v = (old + (median + side * 1e-3) / beta).requires_grad_()
        expected_loss(v, old, line, x, t, beta=beta).backward()
        assert v.grad.sign().item() == side


def test_guidance_is_the_gradient_of_alpha_in_scores(space, noised, t):
    beta, x = 0.7, noised(space.old).requires_grad_()
    slope = torch.autograd.grad(space.alpha(x, t).sum(), x)[0]
    guided = -(x + (1 - t) * space.optimum(x, t, beta)) / t
    close(guided - score(space.old, x, t), 2 / beta * slope)
    close(space.delta(x, t), -t / (1 - t) * slope)
    close(score(space.positive, x, t) - score(space.old, x, t), slope / space.alpha(x, t)[:, None])


def test_delta_and_the_loss_are_affine_in_r(space, noised, t):
    x, beta = noised(space.old), 0.7
    other = type(space)(space.old, torch.tensor([0.2, 0.5, 0.8, 0.4]))
    both = type(space)(space.old, 0.3 * space.r + 0.7 * other.r)
    close(both.delta(x, t), 0.3 * space.delta(x, t) + 0.7 * other.delta(x, t))
    scaled = type(space)(space.old, 0.25 + 0.5 * space.r)
    alpha = scaled.alpha(x, t)[:, None]
    close(alpha * (scaled.positive.velocity(x, t) - space.old.velocity(x, t)), 0.5 * space.delta(x, t))
    old, v = space.old.velocity(x, t), other.old.velocity(x, t) + torch.sin(x)
    losses = [expected_loss(v, old, world, x, t, beta=beta) for world in (space, other, both)]
    close(0.3 * losses[0] + 0.7 * losses[1], losses[2])


@pytest.mark.parametrize("weighting", ["adaptive", "none"])
def test_the_three_predictions_have_one_loss_up_to_weights(space, noised, t, weighting):
    beta, x0 = 0.7, space.old.sample(6, seed=4)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    x, r, times = (1 - t) * x0 + t * eps, torch.linspace(0, 1, 6), torch.full((6,), t)
    old, v = space.old.velocity(x, t), torch.cos(x)
    losses = {
        name: loss_of(
            *(predicted(y, x, t, name) for y in (v, old)), x, x0, times, r,
            beta=beta, weighting=weighting, prediction=name, reduction="none",
        ).loss
        for name in ("v", "x0", "eps")
    }  # fmt: skip
    close(losses["x0"], losses["v"])
    close(losses["eps"], losses["v"])
    # Written by hand in each space, with that space's own error and target.
    for name, target, factor in (("v", eps - x0, t), ("x0", x0, 1.0), ("eps", eps, t / (1 - t))):
        now, before, total = predicted(v, x, t, name), predicted(old, x, t, name), 0.0
        for sign, share in ((1, r), (-1, 1 - r)):
            error = (1 - sign * beta) * before + sign * beta * now - target
            weight = error.abs().mean(1) if weighting == "adaptive" else 1.0
            total = total + M / beta * share * error.square().mean(1) / weight
        # The square has the factor twice, the adaptive weight gives one back.
        close(losses[name], factor ** (1 if weighting == "adaptive" else 2) * total)
