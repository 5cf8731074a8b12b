"""Every alarm is provoked, and a sound run raises none."""

import math
import random

import pytest
import torch

pytest.importorskip("diffusers")

from distributed_worker import Brightness

from nft.alarms import ALARMS, AlarmError, Alarms, distribution, preflight
from nft.config import ConfigError, load_config
from nft.tasks import TASKS
from nft.trainer import Trainer

SMALL = ["prompts_per_epoch=2", "group_size=3", "rollout_steps=2", "timesteps_per_sample=1", "eval_prompts_per_group=1",
         "eval_steps=1", "eval_solver=euler", "lora_rank=4", "epochs=3", "verify_kernels_steps=0",
         "updates_per_epoch=2"]  # fmt: skip


@pytest.fixture
def make(pipeline, tmp_path, monkeypatch):
    def trainer(*overrides, task=Brightness):
        monkeypatch.setitem(TASKS, "shapes", task)
        return Trainer(load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides]), tmp_path / "run")

    return trainer


def alarms(trainer):
    """Names of the alarms of a whole run, by epoch."""
    found = {}
    trainer.train(lambda metrics: found.setdefault(trainer.epoch, []).extend(metrics["alarms"]))
    return {epoch: [message.partition(":")[0] for message in messages] for epoch, messages in found.items()}


def scored(value):
    class Scored(Brightness):
        def score(self, pictures, entries):
            return value(super().score(pictures, entries))

    return Scored


def test_a_sound_run_raises_none(make):
    assert alarms(make()) == {0: [], 1: [], 2: [], 3: []}


def test_equal_rewards(make):
    found = alarms(make(task=scored(torch.zeros_like)))
    assert {"zero_variance", "no_gradient"} <= set(found[1])


def test_a_learning_rate_that_is_far_too_high(make):
    assert alarms(make("learning_rate=3.0"))[1] == ["old_deviation"]


def test_velocities_and_latents_that_have_grown(make):
    trainer = make()
    trainer.policy.transformer.proj_out.weight.data.mul_(100)
    assert {"velocity", "x0_large"} <= set(alarms(trainer)[1])


def test_large_gradients(make):
    assert "gradient" in alarms(make("learning_rate=1.0", "kl_weight=1e4"))[1]


def test_saturated_weights(make):
    assert "saturated" in alarms(make("adv_clip_max=0.01"))[1]


def test_collapsed_latents():
    measured = distribution(torch.full((6,), 0.5), torch.rand(2, 3), torch.zeros(6, 4, 2, 2))
    messages = Alarms({}).epoch({"reward": 0.5, **measured})
    assert [message.partition(":")[0] for message in messages] == ["x0_small"]


def test_a_reward_that_is_not_finite_counts_as_its_groups_mean(make):
    def broken(scores):
        scores[1, 0] = math.nan
        scores[2, 0] = math.inf
        return scores

    trainer = make("preflight=false", task=scored(broken))
    data = trainer.sample()
    r = data["r"]
    assert data["measured"]["nonfinite_rewards"] == 2
    assert r.isfinite().all() and torch.equal(r[:3], torch.full((3,), 0.5)) and not torch.equal(r[3:], r[:3])


def test_held_out_scores_that_are_not_finite_are_told(make):
    def broken(scores):
        scores[0] = math.nan
        return scores

    trainer = make("preflight=false", task=scored(broken))
    metrics = trainer._evaluate(lambda *_: None)
    # Of the six task groups with a picture each.
    assert metrics["nonfinite_scores"] == 1
    assert any("nonfinite_rewards: scores of 1 held-out pictures" in message for message in metrics["alarms"])


@pytest.mark.parametrize(("mode", "least"), [("binary", 0), ("one_only", 0.5)])
def test_the_histogram_is_that_of_what_is_trained_on(make, mode, least):
    data = make("preflight=false", f"advantage_mode={mode}", "adv_clip_max=1").sample()
    measured, r = data["measured"], data["r"]
    assert r.min() == least
    assert measured["r_histogram"] == [int(((r * 10).int().clamp_max(9) == k).sum()) for k in range(10)]
    assert measured["r_saturated"] == ((r <= 0) | (r >= 1)).float().mean()


def test_a_group_without_a_score_teaches_nothing(make):
    def broken(scores):
        scores[:3, 0] = math.nan
        return scores

    data = make("preflight=false", task=scored(broken)).sample()
    assert data["measured"]["nonfinite_rewards"] == 3
    assert data["r"][:3].tolist() == [0.5] * 3 and data["r"][3:].unique().numel() == 3


def test_updates_that_are_not_finite_are_skipped_counted_and_end_the_run(make, monkeypatch):
    trainer = make("preflight=false")
    before = [parameter.detach().clone() for parameter in trainer.policy.trained]
    data, velocity = trainer.sample(), trainer.policy.velocity
    monkeypatch.setattr(trainer.policy, "velocity", lambda *inputs: velocity(*inputs) * math.nan)
    metrics = trainer.optimize(data)
    assert metrics["nonfinite_updates"] == 2 and trainer.step == 0
    assert all(map(torch.equal, before, trainer.policy.trained))
    assert "nonfinite_updates: 2" in " ".join(trainer.alarms.epoch({"reward": 0.0, **metrics}))
    with pytest.raises(AlarmError, match="nonfinite_updates: 4 updates in a row"):
        trainer.optimize(data)
    # One that is finite begins the count anew.
    trainer.alarms.update(True)
    monkeypatch.setattr(trainer.policy, "velocity", velocity)
    assert trainer.optimize(data)["nonfinite_updates"] == 0 and trainer.step == 2


@pytest.mark.parametrize("place", range(4))
def test_an_update_is_skipped_whatever_of_it_is_not_finite(make, place):
    """A loss may overflow where its gradient, divided by the error's size, does not."""
    trainer = make("preflight=false")
    before = [parameter.detach().clone() for parameter in trainer.policy.trained]
    for broken in (True, False):
        for parameter in trainer.policy.trained:
            parameter.grad = torch.ones_like(parameter)
        sums = torch.ones(4)
        sums[place] = math.inf if broken else 1.0
        trainer._update(sums, 1)
        assert trainer.step == (not broken)
        assert all(map(torch.equal, before, trainer.policy.trained)) == broken


def raised(*evaluations, alarm="reward_hacking", threshold=0.5, deviation=0.4, names=("strict",)):
    """Which of the evaluations, each after ten epochs of these rewards, raise the alarm, and for what."""
    watch, found = Alarms({alarm: threshold}), []
    for rewards, *scores in evaluations:
        for reward in rewards * (10 // max(1, len(rewards))):
            watch.epoch({"reward": reward, "reward_std": 0.2})
        messages = watch.evaluation({name: (score, deviation) for name, score in zip(names, scores, strict=True)})
        found.append([message.split()[2] for message in messages if message.startswith(f"{alarm}: held-out ")])
    return found


def test_a_reward_that_is_exploited():
    """The held-out score has to fall by half of its deviation, 0.2, and the reward to rise by half of its own, 0.1."""
    for last, expected in ((([0.9], 0.25), ["strict"]), (([0.75], 0.25), []), (([0.9], 0.35), [])):
        assert raised(([0.5], 0.4), ([0.7], 0.5), last) == [[], [], expected]
    # What counts is the mean of the newest ten epochs.
    assert raised(([0.5], 0.5), ([0.9, 0.5], 0.2))[-1] and not raised(([0.5], 0.5), ([0.6, 0.5], 0.2))[-1]
    # The first evaluation comes before anything is trained.
    assert raised(([], 0.9), ([0.5], 0.5), ([0.9], 0.45)) == [[], [], []]


def test_a_slow_fall_is_one_from_the_best():
    slow = [([0.5 + 0.04 * i], 0.5 - 0.04 * i) for i in range(10)]
    found = raised(*slow)
    assert not any(found[:6]) and all(found[6:])
    # A new best is what the next ones are compared with.
    assert not any(raised(*slow[:5], ([0.9], 0.6), ([1.1], 0.45)))


def test_a_score_that_is_not_finite_is_no_best():
    assert raised(([0.1], math.nan), ([0.2], 0.9), ([0.9], 0.1))[-1] == ["strict"]


def test_a_held_out_score_that_falls_whatever_the_trained_reward_does():
    def told(*evaluations, **options):
        return raised(*evaluations, alarm="held_out_falling", **options)

    # Half of the deviation is 0.2.
    assert told(([0.5], 0.9), ([0.5], 0.71), ([0.5], 0.69)) == [[], [], ["strict"]]
    assert told(([0.5], 0.9), ([0.4], 0.69), ([0.9], 0.69)) == [[], ["strict"], []]  # the last one is exploited
    # The untrained policy's is a score like others: a run may collapse before its second evaluation.
    assert told(([], 0.45), ([0.1], 0.0)) == [[], ["strict"]]
    # Of pictures that have all become alike, better or worse, scores hardly differ.
    watch = Alarms({})
    watch.epoch({"reward": 0.5, "reward_std": 0.1})
    assert watch.evaluation({"strict": (0.8, 0.1)}) == watch.evaluation({"strict": (0.78, 0.001)}) == []
    assert [message.partition(":")[0] for message in watch.evaluation({"strict": (0.7, 0.0)})] == ["held_out_falling"]


def test_a_sound_run_that_is_evaluated_often_raises_none():
    """Prompts are harder in one epoch than in another: the best epoch of many is no measure of one."""
    rng = random.Random(0)
    watch, messages = Alarms({}), []
    for epoch in range(120):
        watch.epoch({"reward": 1 - math.exp(-epoch / 20) + rng.gauss(0, 0.006), "reward_std": 0.035})
        messages += watch.evaluation({"strict": (1 - math.exp(-epoch / 20), 0.3)})
    assert messages == []


def falls(epochs, threshold=0.5, restart_at=None):
    """At which of several evaluations the alarm is raised; before each go these epochs' means and deviations, ten times
    all in all."""
    watch, found = Alarms({"reward_falling": threshold}), []
    for i, part in enumerate(epochs):
        if i == restart_at:
            watch.restart()
        for mean, deviation in part * (10 // max(1, len(part))):
            watch.epoch({"reward": mean, "reward_std": deviation})
        messages = [m for m in watch.evaluation({"strict": (0.5, 0.1)}) if m.startswith("reward_falling")]
        assert all("the trained reward is" in m and "learning_rate" in m for m in messages)
        found += [i] * len(messages)
        # What a resumed run goes on from.
        state = watch.state()
        watch = Alarms({"reward_falling": threshold})
        watch.load(state)
    return found


def test_a_trained_reward_that_falls_far_below_its_best_is_told():
    # 0.2 is half of the deviation; single epochs may be below.
    assert falls([[(0.6, 0.4)], [(0.9, 0.4), (0.1, 0.4)], [(0.41, 0.4)], [(0.39, 0.4)]]) == [3]
    assert falls([[(0.6, 0.4)], [(0.39, 0.4)]], threshold=1.0) == []
    # Pictures that have become noise score alike, and those of a policy that has learned its task score alike, too.
    assert falls([[(0.6, 0.4)], [(0.45, 0.01)], [(0.3, 0.01)]]) == [2]
    assert falls([[(0.3, 0.4)], [(0.99, 0.01)], [(0.9, 0.2)], [(0.95, 0.1)]]) == []
    # What another stage's task scored is no best of this one's.
    assert falls([[(0.9, 0.4)], [(0.2, 0.4)]], restart_at=1) == []
    assert falls([[], [(0.9, 0.4)], [(0.2, 0.4)]]) == [2]


def test_a_diverging_run_is_told(make):
    """As users of such trainers report most: the pictures turn to noise while every other number looks sane."""
    trainer = make("epochs=4", "eval_every=1")
    sample = trainer.sample
    rewards = iter((0.8, 0.9, 0.2, 0.1))

    def worse():
        data = sample()
        data["measured"] |= {"reward": next(rewards), "reward_std": 0.3}
        return data

    trainer.sample, told = worse, []
    trainer.train(lambda metrics: told.append([m for m in metrics["alarms"] if m.startswith("reward_falling")]))
    assert [len(messages) for messages in told] == [0, 0, 0, 0, 0, 0, 1, 0, 1]


def test_rewards_of_any_unit_and_those_that_are_only_watched():
    rewards = ([0.5], 0.9, 0.28), ([0.8], 0.9, 0.24)
    assert raised(*rewards, names=("strict", "reward_hpsv2"), deviation=0.03) == [[], ["reward_hpsv2"]]


def test_what_an_epochs_pictures_say():
    r = torch.tensor([0.0, 0.05, 0.5, 0.55, 0.999, 1.0])
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 4.0]])
    x0 = torch.tensor([3.0, -4.0]).repeat(6, 2).view(6, 1, 2, 2)
    measured = distribution(r, rewards, x0)
    assert measured["r_histogram"] == [2, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    assert distribution(r[1:4], rewards, x0)["r_histogram"] == [1, 0, 0, 0, 0, 2, 0, 0, 0, 0]
    assert measured["r_saturated"] == pytest.approx(2 / 6) and measured["zero_variance_groups"] == 0.5
    assert measured["reward_std"] == pytest.approx((9.5 / 6) ** 0.5)
    assert measured["x0_rms"] == pytest.approx(12.5**0.5)


# As docs/training.md lists them: the metric, its threshold, whether beyond is above, and what it usually is.
DOCUMENTED = {
    "old_deviation": ("old_deviation_relative", 0.5, True, "learning rate is too high"),
    "saturated": ("r_saturated", 0.5, True, "rewards have outliers"),
    "zero_variance": ("zero_variance_groups", 0.8, True, "prompts are too easy or too hard"),
    "x0_large": ("x0_rms", 5.0, True, "the policy diverges"),
    "x0_small": ("x0_rms", 0.05, False, "collapsed"),
    "velocity": ("velocity_rms", 10.0, True, "the policy diverges"),
    "gradient": ("grad_norm", 100.0, True, "the loss is badly scaled"),
    "no_gradient": ("grad_norm", 1e-12, False, "all rewards are equal"),
    "nonfinite_rewards": ("nonfinite_rewards", 0.0, True, "the mean of their group"),
}


@pytest.mark.parametrize("name", ALARMS)
def test_thresholds_and_messages(name):
    """Just beyond the threshold and not on it, for a threshold of one's own too; the message says what it was about."""
    metric, threshold, above, advice = DOCUMENTED[name]
    for chosen, watch in ((threshold, Alarms({})), (2 * threshold + 1, Alarms({name: 2 * threshold + 1}))):
        for value, expected in ((chosen + (0.01 if above else -0.01) * (chosen or 1), 1), (chosen, 0)):
            messages = [m for m in watch.epoch({"reward": 0.0, metric: value}) if m.startswith(f"{name}:")]
            assert len(messages) == expected
            assert all(metric in message and advice in message for message in messages)


def test_unknown_thresholds_are_named():
    with pytest.raises(ConfigError, match=r"alarms\.velocty: unknown key, did you mean velocity"):
        load_config("shapes", ["alarms.velocty=1.0"])


def test_preflight_leaves_no_trace(make):
    trainer = make()
    before = [p.detach().clone() for p in (*trainer.policy.trained, *trainer.policy._old)]
    rng = torch.get_rng_state()
    preflight(trainer)
    assert all(map(torch.equal, before, (*trainer.policy.trained, *trainer.policy._old)))
    assert all(parameter.grad is None for parameter in trainer.policy.trained)
    assert torch.equal(rng, torch.get_rng_state()) and trainer.step == trainer.epoch == 0


def test_preflight_takes_a_weighting_that_is_zero_at_the_first_of_two_times(make):
    preflight(make("rollout_steps=2", "timesteps_per_sample=1", "weighting=(1-t)/t2", "kl_weight=0.0"))


def test_preflight_takes_a_single_picture_of_one_colour(make, monkeypatch):
    """As of a prompt for a white wall."""
    trainer = make()
    decode = trainer.policy.decode

    def first_white(x0):
        pictures = decode(x0)
        pictures[0] = 255
        return pictures

    monkeypatch.setattr(trainer.policy, "decode", first_white)
    preflight(trainer)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_preflight_differentiates_no_more_at_once_than_training(make, size):
    """Else it may need more memory, and CUDA graphs are recorded of the largest batch."""
    trainer, seen = make(f"micro_batch={size}"), []
    backward = trainer.backward
    trainer.backward = lambda x0, weights: (seen.append((len(x0), weights.tolist())), backward(x0, weights))
    preflight(trainer)
    assert seen == [(min(size, 2), [1.0, 0.0][:size])]


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("scores", "scores are not finite"),
        ("latents", "latents are not finite"),
        ("pictures", "every picture has one colour"),
        ("gradient", "the gradient is zero"),
        ("backward", "the backward fails: .*does not require grad"),
        ("step", "a step makes the weights infinite"),
    ],
)
def test_preflight_names_what_is_broken(make, monkeypatch, breakage, message):
    task = scored(lambda scores: scores * math.nan) if breakage == "scores" else Brightness
    trainer = make(*(["learning_rate=1e38"] if breakage == "step" else []), task=task)
    policy = trainer.policy
    velocity, decode, backward = policy.velocity, policy.decode, trainer.backward

    def large(_):
        for parameter in policy.trained:
            parameter.grad.fill_(1e3)

    if breakage == "latents":
        monkeypatch.setattr(policy, "velocity", lambda *inputs: velocity(*inputs) * math.nan)
    if breakage == "pictures":
        monkeypatch.setattr(policy, "decode", lambda x: torch.zeros_like(decode(x)))
    if breakage == "gradient":
        zero = [0 * policy.trained[0].sum()]
        monkeypatch.setattr(policy, "velocity", lambda *inputs: velocity(*inputs).detach() + zero[0])
    if breakage == "backward":
        monkeypatch.setattr(policy, "velocity", lambda *inputs: velocity(*inputs).detach())
    if breakage == "step":
        monkeypatch.setattr(trainer, "backward", lambda *given: large(backward(*given)))
    with pytest.raises(AlarmError, match=f"preflight: {message}"):
        trainer.train()
    assert not (trainer.folder / "metrics.jsonl").exists()
