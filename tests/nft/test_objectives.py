"""Objectives against their formulas."""

import math

import pytest
import torch
from distributed_worker import Brightness, by_fork, train_until

pytest.importorskip("diffusers")

import distributed_worker

from nft.config import load_config
from nft.objectives import OBJECTIVES, Batch, Step
from nft.policy import Policy, times
from nft.rollout import noisy, rollout, solver_options
from nft.tasks import TASKS, Shapes
from nft.trainer import Trainer
from nft_kernels import add_noise
from nft_kernels.solvers import table

pytestmark = pytest.mark.forks


def config(objective, **changes):
    base = "shapes_flow_grpo" if objective == "grpo" else "shapes"
    return load_config(base, [f"objective={objective}", *(f"{k}={v}" for k, v in changes.items())])


def test_sft_keeps_what_is_above_its_groups_mean():
    advantages = torch.tensor([-1.0, 0.5, 2.0, 0.0, 0.0, -0.5, 0.5, 0.0])
    weights = OBJECTIVES["sft"].weights(advantages, config("sft"))
    torch.testing.assert_close(weights, torch.tensor([0.0, 8 / 3, 8 / 3, 0, 0, 0, 8 / 3, 0]))
    assert not OBJECTIVES["sft"].weights(torch.zeros(4), config("sft")).any()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_rwr_weighs_by_the_exponential(temperature):
    advantages = torch.tensor([-3.0, 0.0, 1.0, 2.5])
    weights = OBJECTIVES["rwr"].weights(advantages, config("rwr", rwr_temperature=temperature))
    expected = [math.exp(a / temperature) for a in advantages.tolist()]
    mean = sum(expected) / 4
    torch.testing.assert_close(weights, torch.tensor([e / mean for e in expected]))
    # No overflow for any advantage.
    assert OBJECTIVES["rwr"].weights(advantages * 1e4, config("rwr")).isfinite().all()


@pytest.mark.parametrize("objective", ["sft", "rwr"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_flow_matching_is_the_weighted_error_of_the_velocity(objective, kl_weight):
    g = torch.Generator().manual_seed(0)
    x0, eps, v_theta, v_ref = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(4))
    t, weights = torch.tensor([0.1, 0.5, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    x_t = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * eps
    v_theta.requires_grad_()
    batch = Batch(v_theta, None, v_ref if kl_weight else None, x_t, x0, t, weights)
    out = OBJECTIVES[objective].loss(batch, config(objective, kl_weight=kl_weight))
    out.loss.backward()
    expected = sum(
        w * ((v - (e - x)) ** 2).mean() + kl_weight * ((v - r) ** 2).mean()
        for w, v, e, x, r in zip(weights.double(), v_theta.detach().double(), eps.double(), x0.double(), v_ref.double(),
                                 strict=True)
    ) / 3  # fmt: skip
    torch.testing.assert_close(out.loss.detach().double(), expected, rtol=1e-5, atol=1e-6)
    error = v_theta.detach() - (eps - x0)
    gradient = 2 / 16 / 3 * (weights.view(-1, 1, 1, 1) * error + kl_weight * (v_theta.detach() - v_ref))
    torch.testing.assert_close(v_theta.grad, gradient, rtol=1e-4, atol=1e-6)
    assert out.kl.any() == bool(kl_weight)
    # No old policy is evaluated.
    assert out.old_deviation.tolist() == [0, 0, 0]


def scalars(*values):
    """Each number as a batch of one sample of one element."""
    return [torch.tensor([[[[value]]]], dtype=torch.float64) for value in values]


@pytest.mark.parametrize(
    ("weight", "loss", "gradient"), [(1.0, -1.2, 0.0), (-1.0, math.exp(0.5), -0.4 * math.exp(0.48))]
)
def test_grpo_by_hand(weight, loss, gradient):
    """x = 1, a = 0.5, b = -0.2, c = 0.1 and x' = 0.4: the step's mean is 0.3 for v_old = 1 and 0.4 for v_theta = 0.5,
    so the densities' logarithms differ by 0.1^2 / (2 0.1^2) = 0.5, and e^0.5 is beyond 1.2."""
    v_theta, v_old, v_ref, x, after = scalars(0.5, 1.0, 0.0, 1.0, 0.4)
    v_theta.requires_grad_()
    a, b, c, t, w = (torch.tensor([value], dtype=torch.float64) for value in (0.5, -0.2, 0.1, 0.5, weight))
    options = config("grpo", clip_range=0.2, kl_weight=0.25)
    batch = Batch(v_theta, v_old, v_ref, x, x, t, w, Step(after, a, b, c))
    out = OBJECTIVES["grpo"].loss(batch, options)
    # The KL of two normals of equal deviation: means 0.4 and 0.5 differ by one c.
    assert out.kl.item() == pytest.approx(0.5) and out.old_deviation.item() == pytest.approx(0.5)
    assert out.loss.item() == pytest.approx(loss + 0.25 * 0.5)
    # At mean 0.38 the log-ratio is (0.1^2 - 0.02^2) / 0.02 = 0.48; its derivative by v_theta 0.02 / 0.1^2 b = -0.4.
    (moved,) = scalars(0.6)
    moved.requires_grad_()
    OBJECTIVES["grpo"].loss(batch._replace(v_theta=moved, v_ref=None), options).loss.backward()
    assert moved.grad.item() == pytest.approx(gradient)


def randoms(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(5)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_declares_what_it_reads(name):
    class Seen:
        def __init__(self):
            self.keys, self.config = set(), config(name)

        def __getattr__(self, key):
            self.keys.add(key)
            return getattr(self.config, key)

    options, (v_theta, v_old, v_ref, x, x0) = Seen(), randoms()
    weights, t = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64), torch.full((4,), 0.5, dtype=torch.float64)
    r = OBJECTIVES[name].weights(weights, options)
    OBJECTIVES[name].loss(Batch(v_theta, v_old, v_ref, x, x0, t, r, Step(x0, t, t, t)), options)
    assert options.keys - {"kl_weight"} == {*OBJECTIVES[name].reads}


@pytest.mark.parametrize("clip_range", [0.02, 10.0])
def test_grpo_is_the_clipped_ratio_of_normal_densities(clip_range):
    v_old, move, v_ref, x, z = randoms()
    v_theta = (v_old + 0.3 * move).requires_grad_()
    t = torch.linspace(0.2, 0.9, 4, dtype=torch.float64)
    a, b, c = (torch.tensor(values, dtype=torch.float64) for values in ([1.1, 1.0, 0.9, 0.8], [-0.1, -0.3, -0.2, -0.4],
                                                                        [0.2, 0.5, 0.3, 0.4]))  # fmt: skip
    w = torch.tensor([1.5, -2.0, 0.5, -0.1], dtype=torch.float64)

    def normal(v, i):
        return torch.distributions.Normal(a[i] * x[i] + b[i] * v[i], c[i])

    after = torch.stack([a[i] * x[i] + b[i] * v_old[i] + c[i] * z[i] for i in range(4)])
    options = config("grpo", clip_range=clip_range, kl_weight=0.3)
    batch = Batch(v_theta, v_old, v_ref, x, x, t, w, Step(after, a, b, c))
    out = OBJECTIVES["grpo"].loss(batch, options)
    expected, clips = 0.0, 0
    for i in range(4):
        rho = (normal(v_theta, i).log_prob(after[i]).mean() - normal(v_old, i).log_prob(after[i]).mean()).exp()
        clips += abs(rho.item() - 1) > clip_range
        kept = min(max(rho.item(), 1 - clip_range), 1 + clip_range) if abs(rho.item() - 1) > clip_range else rho
        expected -= min(w[i] * rho, w[i] * kept, key=float) / 4
        divergence = torch.distributions.kl_divergence(normal(v_theta, i), normal(v_ref, i)).mean()
        torch.testing.assert_close(out.kl[i], divergence.detach())
        expected += 0.3 * divergence / 4
    assert (clips > 0) == (clip_range < 1)
    torch.testing.assert_close(out.loss, expected)
    mine, theirs = (torch.autograd.grad(value, v_theta, retain_graph=True)[0] for value in (out.loss, expected))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("objective", ["grpo", "awm", "sft"])
def test_gradients_are_those_of_finite_differences(objective):
    v_old, move, v_ref, x0, x = randoms(1)
    t, w = torch.linspace(0.2, 0.9, 4, dtype=torch.float64), torch.tensor([1.5, -2.0, 0.5, -0.1], dtype=torch.float64)
    step = Step(x0, 1 - t, -t / 5, t / 2) if objective == "grpo" else None
    wide = {} if objective == "sft" else {"clip_range": 50.0}
    options = config(objective, kl_weight=0.3, **wide)

    def loss(v_theta):
        return OBJECTIVES[objective].loss(Batch(v_theta, v_old, v_ref, x, x0, t, w, step), options).loss

    assert torch.autograd.gradcheck(loss, (v_old + 0.1 * move).requires_grad_())


def test_advantages_are_clipped_and_for_awm_scaled_to_one():
    advantages = torch.tensor([-9.0, -1.0, 0.0, 2.0, 5.0])
    assert OBJECTIVES["grpo"].weights(advantages, config("grpo", adv_clip_max=2.0)).tolist() == [-2, -1, 0, 2, 2]
    assert OBJECTIVES["awm"].weights(advantages, config("awm", adv_clip_max=2.0)).tolist() == [-1, -0.5, 0, 1, 1]


def test_awm_by_hand():
    """x0 = 1 and x_t = 3 at t = 0.5: v = 4. L is 1 for v_theta = 3 and 4 for v_old = 2: a ratio of e^(3 s)."""
    v_theta, v_old, v_ref, x0, x_t = scalars(3.0, 2.0, 1.0, 1.0, 3.0)
    t, w = (torch.tensor([value], dtype=torch.float64) for value in (0.5, -2.0))
    for weighting, scale in (("none", 1), ("t", 0.5), ("t2", 0.25), ("1/t", 2), ("(1-t)/t2", 2), ("adaptive", 1 / 4)):
        options = config("awm", weighting=weighting, clip_range=100.0, kl_weight=0.5)
        out = OBJECTIVES["awm"].loss(Batch(v_theta, v_old, v_ref, x_t, x0, t, w), options)
        assert out.loss.item() == pytest.approx(2 * math.exp(3 * scale) + 0.5 * 4)
    assert OBJECTIVES["awm"].loss(
        Batch(v_theta, v_old, None, x_t, x0, t, -w), config("awm", weighting="none", clip_range=0.2)
    ).loss.item() == pytest.approx(-2 * 1.2)


def test_awm_divides_by_no_error_of_zero():
    """Of a policy that is exact the ratio is 1 and there is nothing to learn, for a gradient that is finite."""
    _, v_old, v_ref, x0, x_t = scalars(4.0, 4.0, 4.0, 1.0, 3.0)
    t, w = (torch.tensor([value], dtype=torch.float64) for value in (0.5, 2.0))
    leaf = v_old.clone().requires_grad_()
    options = config("awm", weighting="adaptive")
    out = OBJECTIVES["awm"].loss(Batch(leaf, v_old, v_ref, x_t, x0, t, w), options)
    out.loss.backward()
    assert out.loss.item() == -2.0 and leaf.grad.item() == 0.0


def test_awm_on_policy_is_flow_matching_weighed_by_the_advantage():
    v, _, v_ref, x0, x_t = randoms(2)
    t, w = torch.linspace(0.2, 0.9, 4, dtype=torch.float64), torch.tensor([1.0, -0.5, 0.2, -1.0], dtype=torch.float64)
    gradients = []
    for objective, unweighted in (("awm", {"weighting": "none"}), ("rwr", {})):
        leaf = v.clone().requires_grad_()
        options = config(objective, kl_weight=0.1, **unweighted)
        OBJECTIVES[objective].loss(Batch(leaf, None, v_ref, x_t, x0, t, w), options).loss.backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_positive_is_the_loss_without_its_negative_branch(beta):
    v_theta, v_old, v_ref, x0, x_t = randoms(3)
    t, r = torch.linspace(0.2, 0.9, 4, dtype=torch.float64), torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    options = config("positive", beta=beta, kl_weight=0.1)
    out = OBJECTIVES["positive"].loss(Batch(v_theta, v_old, v_ref, x_t, x0, t, r), options)
    expected = 0.0
    for i in range(4):
        error = x_t[i] - t[i] * ((1 - beta) * v_old[i] + beta * v_theta[i]) - x0[i]
        branch = 5 / beta * error.square().mean() / error.abs().mean()
        expected += r[i] * (branch + 0.1 * (v_theta[i] - v_ref[i]).square().mean()) / 4
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize(("solver", "options"), [("flow-sde", {}), ("cps", {}), ("mixed", {"window": (1, 3)})])
def test_a_rollout_keeps_the_states_around_its_noise(pipeline, solver, options):
    """Each kept state follows from the one before by its row, with the noise that the seed and the row stand for."""
    policy = Policy(load_config("shapes", [f"pipeline={pipeline}"]))
    prompts, seeds, grid = ["a red circle", "two blue squares", "a triangle"], [5, 6, 7], times(4, 1.0)
    states = []
    x0 = rollout(policy, prompts, seeds, grid, solver, 2, states=states, **options)
    assert torch.equal(x0, rollout(policy, prompts, seeds, grid, solver, 2, **options))
    (kept,) = states
    rows = table(solver, grid.tolist(), **options).rows
    part = noisy(table(solver, grid.tolist(), **options))
    assert part == {"flow-sde": slice(0, 4), "cps": slice(0, 3), "mixed": slice(1, 3)}[solver]
    assert kept.shape == (3, part.stop - part.start + 1, *policy.latent_shape)
    if part.start == 0:
        start = add_noise(torch.zeros_like(x0), torch.ones(3), seed=torch.tensor(seeds))
        assert torch.equal(kept[:, 0], start)
    if part.stop == 4:
        assert torch.equal(kept[:, -1], x0)
    embeds, pooled = policy.embed(prompts)
    for k, row in enumerate(rows[part]):
        with torch.no_grad():
            v = policy.velocity(kept[:, k], row.t * torch.ones(3), embeds, pooled)
        z = (kept[:, k + 1] - row.a * kept[:, k] - row.b[0] * v) / row.c
        # 3072 draws: five standard errors of the mean and of the deviation.
        assert abs(z.mean().item()) < 0.09 and abs(z.std().item() - 1) < 0.064


def test_guidance_against_the_reference_is_linear_in_a_single_step(pipeline):
    """From t = 1 to 0 Euler gives x0 = x - v: that of the reference, and the scale times the difference to it."""
    policy = Policy(load_config("shapes", [f"pipeline={pipeline}"]))
    with torch.no_grad():
        for p in policy.trained:
            p.add_(0.05)

    def draw(**options):
        return rollout(policy, ["a red circle", "a triangle"], [1, 2], times(1, 1.0), "euler", 2, **options)

    policy.use(None)
    base = draw()
    policy.use("default")
    trained = draw()
    assert (trained - base).abs().max() > 0.01
    for scale in (0.0, 1.0, 2.5):
        expected = base + scale * (trained - base)
        torch.testing.assert_close(draw(guidance=scale, reference=True), expected, rtol=1e-4, atol=1e-5)


def test_windows_move_with_the_epoch():
    mix = load_config("shapes_mix_grpo", ["window_epochs=2"])
    starts = [solver_options(mix, epoch)["window"][0] for epoch in range(22)]
    assert starts == [start for start in (*range(9), 0, 1) for _ in range(2)]
    fast = load_config("shapes_flow_grpo_fast")
    windows = [solver_options(fast, epoch)["window"] for epoch in range(60)]
    assert set(windows) == {(0, 3), (1, 4), (2, 5)}
    assert windows == [solver_options(fast, epoch)["window"] for epoch in range(60)]
    # Of runs of other seeds they lie elsewhere.
    other = load_config("shapes_flow_grpo_fast", ["seed=1"])
    assert windows != [solver_options(other, epoch)["window"] for epoch in range(60)]
    assert solver_options(load_config("shapes_flow_grpo"), 3) == {"eta": 0.7}


SMALL = ["prompts_per_epoch=2", "group_size=3", "rollout_steps=4", "timesteps_per_sample=2", "micro_batch=5",
         "epochs=3", "eval_prompts_per_group=1", "eval_steps=1", "eval_every=3", "lora_rank=4",
         "updates_per_epoch=2"]  # fmt: skip


@pytest.mark.parametrize("name", ["mix_grpo", "v_grpo"])
def test_a_resumed_run_of_a_baseline_equals_an_unbroken_one(pipeline, tmp_path, monkeypatch, name):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    settings = load_config(f"shapes_{name}", [f"pipeline={pipeline}", *SMALL, "window_epochs=1", "kl_weight=0.01"])
    whole = Trainer(settings, tmp_path / "whole")
    start = [p.detach().clone() for p in whole.policy.trained]
    whole.train()
    first = Trainer(settings, tmp_path / "parts")
    train_until(first, 1)
    second = Trainer(settings, tmp_path / "parts", resume=True)
    second.train()
    assert all(map(torch.equal, whole.policy.trained, second.policy.trained))
    assert any(not torch.equal(a, b) for a, b in zip(whole.policy.trained, start, strict=True))


def test_grpo_raises_the_density_of_what_scored_well(pipeline, tmp_path, monkeypatch):
    """After an epoch the steps of the better half have become likelier than those of the other, under v_theta."""
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    settings = load_config("shapes_flow_grpo", [f"pipeline={pipeline}", *SMALL, "timesteps_per_sample=4",
                                                "updates_per_epoch=1", "clip_range=0.5", "kl_weight=0"])  # fmt: skip
    trainer = Trainer(settings, tmp_path)
    data = trainer.sample()
    before = [p.detach().clone() for p in trainer.policy.trained]
    trainer.optimize(data)
    change = torch.zeros(6)
    embeds, pooled = trainer.policy.embed(data["prompts"])
    for k, row in enumerate(table("flow-sde", trainer.grid.tolist(), eta=0.7).rows):
        x, after = data["states"][:, k], data["states"][:, k + 1]
        with torch.no_grad():
            new = trainer.policy.velocity(x, row.t * torch.ones(6), embeds, pooled)
            now = [p.detach().clone() for p in trainer.policy.trained]
            for p, value in zip(trainer.policy.trained, before, strict=True):
                p.copy_(value)
            old = trainer.policy.velocity(x, row.t * torch.ones(6), embeds, pooled)
            for p, value in zip(trainer.policy.trained, now, strict=True):
                p.copy_(value)
        squares = [(after - row.a * x - row.b[0] * v).square().flatten(1).mean(1) for v in (old, new)]
        change += (squares[0] - squares[1]) / (2 * row.c**2)
    assert (data["r"] * change).sum() > 0 and change.abs().max() > 1e-6


def test_a_step_is_taken_from_the_row_that_made_it(pipeline, tmp_path, monkeypatch):
    """Where the window has moved, and both its rows are mixed, the old policy's velocity leaves normal noise."""
    settings = load_config("shapes_mix_grpo", [f"pipeline={pipeline}", *SMALL, "group_size=6", "window_epochs=1"])
    trainer = Trainer(settings, tmp_path)
    trainer.epoch = 1
    data, grid = trainer.sample(), trainer.grid.tolist()
    assert trainer._times() == grid[1:3]
    t = torch.tensor(grid[1:3] * 6)
    x, step = trainer._step(data["states"], t)
    assert torch.equal(x[::2], data["states"][::2, 0]) and torch.equal(x[1::2], data["states"][1::2, 1])
    with torch.no_grad():
        v = trainer.policy.velocity(x, t, *trainer.policy.embed(data["prompts"]))
    a, b, c = (value.view(-1, 1, 1, 1) for value in step[1:])
    z = (step.x - a * x - b * v) / c
    # 12,288 draws: five standard errors of the mean and of the deviation.
    assert abs(z.mean().item()) < 0.045 and abs(z.std().item() - 1) < 0.032


def test_shared_noise_is_one_draw_for_a_group(pipeline, tmp_path, monkeypatch):
    settings = load_config("shapes_v_grpo", [f"pipeline={pipeline}", *SMALL])
    trainer, seen = Trainer(settings, tmp_path), []
    monkeypatch.setattr(trainer, "_accumulate", lambda data, pairs: (seen.extend(pairs), torch.zeros(4))[1])
    trainer.optimize(trainer.sample())
    noises = [{(t, seed) for i, t, seed in seen if i // 3 == group} for group in range(2)]
    assert len(seen) == 12 and [len(noise) for noise in noises] == [2, 2] and not noises[0] & noises[1]


def test_two_processes_train_grpo_as_one_does(pipeline, tmp_path, monkeypatch):
    changes = ["objective=grpo", "rollout_solver=flow-sde", "old_policy=copy", "rollout_options={}", "clip_range=0.1"]
    monkeypatch.setattr(distributed_worker, "SETTINGS", [*distributed_worker.SETTINGS, *changes])
    monkeypatch.setitem(TASKS, "shapes", Shapes)
    threads = torch.get_num_threads()
    settings = load_config("shapes", [f"pipeline={pipeline}", *distributed_worker.SETTINGS])
    start = [p.detach().clone() for p in Trainer(settings, tmp_path / "start").policy.trained]
    distributed_worker.run(tmp_path / "run1", pipeline)
    torch.set_num_threads(threads)
    by_fork(2, lambda: distributed_worker.run(tmp_path / "run2", pipeline))
    one, *two = (torch.load(tmp_path / f"run{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert all(map(torch.equal, two[0]["trained"], two[1]["trained"]))
    # As a whole: where a gradient nearly cancels, Adam makes any share of a step of its rounding.
    ours, theirs = (torch.cat([p.flatten() for p in run["trained"]]) for run in (two[0], one))
    change = theirs - torch.cat([p.flatten() for p in start])
    assert (ours - theirs).norm() <= 1e-3 * change.norm()
