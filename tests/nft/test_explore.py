"""Rollout strategies: candidates that are drawn cheaply, of which some are drawn exactly, and groups left out."""

import itertools
import json
import statistics

import pytest
import torch

pytest.importorskip("diffusers")

import distributed_worker
from distributed_worker import Brightness, by_fork, train_until

import nft.trainer
from nft.compare import read_run
from nft.config import ConfigError, load_config
from nft.report import write_report
from nft.rollout import rollout
from nft.selection import extremes, uninformative
from nft.tasks import TASKS, Shapes
from nft.trainer import Trainer
from nft_kernels.models import float8

pytestmark = pytest.mark.forks

SMALL = ["prompts_per_epoch=2", "group_size=4", "rollout_steps=3", "timesteps_per_sample=2", "micro_batch=5",
         "eval_prompts_per_group=1", "eval_steps=2", "lora_rank=4", "updates_per_epoch=3", "epochs=2",
         "preflight=false", "verify_kernels_steps=0"]  # fmt: skip
DONE = {group[0]["tag"] for group in Shapes(torch.device("cpu")).train_prompts()[::2]}


class FirstIsDone(Brightness):
    """Pictures of an epoch's first prompt, as every other task group is such, all score 0.95 or a little more."""

    def score(self, pictures, entries):
        done = torch.tensor([[entry["tag"] in DONE] for entry in entries])
        scores = super().score(pictures, entries)
        return torch.where(done, 0.95 + scores / 50, scores / 2)


FILTER = ["filter_mean=0.9", "filter_std=0.05"]


def settings(pipeline, *overrides):
    return load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides])


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", FirstIsDone)


def parameters(trainer):
    return [p.detach().clone() for p in trainer.policy.trained]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_extremes_of_hand_worked_groups():
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.7, 0.3], [0.2, 0.1, 0.4, 0.3, 0.0]])
    assert extremes(rewards, 2).tolist() == [[0, 1], [2, 4]]
    # Of an odd number the best half is the larger one.
    assert extremes(rewards, 3).tolist() == [[0, 1, 3], [2, 3, 4]]
    assert extremes(rewards, 1).tolist() == [[1], [2]] and extremes(rewards, 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    # Among equals the first ones count as better, the last ones as worse.
    assert extremes(torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 1.0, 1.0, 0.0]]), 2).tolist() == [[0, 3], [1, 3]]


@pytest.mark.parametrize("count", [2, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_extremes_contrast_more_than_any_other_choice(seed, count):
    """Of all subsets the one in which the better half beats the worse half by most."""
    rewards = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed))

    def contrast(values):
        ordered = sorted(values)
        return sum(ordered[count // 2 :]) - sum(ordered[: count // 2])

    for row, kept in zip(rewards.tolist(), extremes(rewards, count).tolist(), strict=True):
        assert kept == sorted(set(kept))
        best = max(itertools.combinations(range(8), count), key=lambda index: contrast([row[i] for i in index]))
        assert kept == list(best)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_filtered_that_are_high_and_hardly_differ(seed):
    rewards = 0.7 + 0.3 * torch.rand(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    filtered = uninformative(rewards, 0.85, 0.07).tolist()
    assert filtered == [statistics.fmean(row) >= 0.85 and statistics.pstdev(row) < 0.07 for row in rewards.tolist()]
    assert 0 < sum(filtered) < 40


def test_the_mean_may_be_at_its_threshold_and_the_deviation_may_not():
    rewards = torch.tensor([[0.5, 1.0], [1.0, 1.0], [0.5, 0.5], [0.0, 0.0]])
    assert uninformative(rewards, 0.75, 0.25).tolist() == [False, True, False, False]
    assert uninformative(rewards, 0.75, 0.26).tolist() == [True, True, False, False]
    assert uninformative(rewards, 0.5, 0.25).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: extremes(torch.zeros(4), 2), r"rewards: got shape \(4,\), accepted is \(P, G\)"),
        (lambda: extremes(torch.zeros(0, 4), 2), r"rewards: got shape \(0, 4\)"),
        (lambda: extremes(torch.tensor([[1.0, float("nan")]]), 1), "rewards: got NaN or infinity"),
        (lambda: extremes(torch.zeros(1, 4), 5), "count: got 5, accepted are 1 to 4"),
        (lambda: extremes(torch.zeros(1, 4), 0), "count: got 0, accepted are 1 to 4"),
        (lambda: uninformative(torch.zeros(4), 0.9, 0.1), r"rewards: got shape \(4,\)"),
        (lambda: uninformative(torch.tensor([[1.0, float("inf")]]), 0.9, 0.1), "rewards: got NaN or infinity"),
    ],
)
def test_rewards_that_cannot_be_selected_by_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["explore_steps=2"], 2),
        (["objective=grpo", "rollout_solver=flow-sde", "old_policy=copy"], 3),
        (["explore_float8=true", "fused_transformer=true"], 3),
    ],
)
def test_the_kept_pictures_are_those_of_a_plain_rollout_from_their_seeds(
    pipeline, tmp_path, monkeypatch, overrides, steps
):
    if "explore_float8=true" in overrides and (reason := float8.why_not(torch.empty(0))):
        pytest.skip(reason)
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    trainer = Trainer(settings(pipeline, "explore=7", "rollout_batch=5", *overrides), tmp_path)
    calls = []

    def recorded(policy, prompts, seeds, grid, *rest, **options):
        calls.append((prompts, seeds, len(grid) - 1))
        return rollout(policy, prompts, seeds, grid, *rest, **options)

    monkeypatch.setattr(nft.trainer, "rollout", recorded)
    data = trainer.sample()
    prompts, seeds = ([x for call in calls if call[2] == steps for x in call[part]][:14] for part in (0, 1))
    assert len(set(seeds)) == 14 and [len(set(prompts[i : i + 7])) for i in (0, 7)] == [1, 1]
    assert sum(len(call[0]) for call in calls) == 14 + 8

    def plain(count, **options):
        grid, solver = trainer.policy.times(count), trainer.config.rollout_solver
        return rollout(trainer.policy, prompts, seeds, grid, solver, 14, **options)

    states = []
    with trainer.policy.merged("old", float8=trainer.config.explore_float8):
        candidates = plain(steps)
    with trainer.policy.merged("old"):
        exact = plain(3, states=states)
    # In as many steps float8 comes close, and no more.
    torch.testing.assert_close(candidates, exact, rtol=0, atol={2: 3.0, 3: 0.1}[steps])
    assert torch.equal(candidates, exact) == (data["states"] is not None)
    cheap = trainer.policy.decode(candidates).double().mean((1, 2, 3)) / 255
    ranked = [sorted(range(i, i + 7), key=lambda i: cheap[i].item()) for i in (0, 7)]
    kept = [i for ranks in ranked for i in sorted([*ranks[:2], *ranks[-2:]])]
    assert torch.equal(data["x0"], exact[kept]) and data["prompts"] == [prompts[i] for i in kept]
    if data["states"] is not None:
        assert torch.equal(data["states"], states[0][kept])
    scores = trainer.policy.decode(exact[kept]).double().mean((1, 2, 3)) / 255
    torch.testing.assert_close(data["scores"][:, 0].double(), scores, rtol=1e-6, atol=1e-6)
    assert data["measured"]["explore_reward"] == pytest.approx(cheap.mean().item(), rel=1e-6)
    assert data["measured"]["reward"] == pytest.approx(scores.mean().item(), rel=1e-6)
    # Advantages are those of the exact scores.
    groups = scores.view(2, 4)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (scores.std(correction=0) + 1e-4)).flatten()
    expected = advantages.clamp(-5, 5) if data["states"] is not None else advantages.clamp(-5, 5) / 10 + 0.5
    torch.testing.assert_close(data["r"].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_candidate_without_a_score_is_counted_and_not_an_extreme(pipeline, tmp_path, monkeypatch):
    class Broken(Brightness):
        def score(self, pictures, entries):
            scores = super().score(pictures, entries)
            scores[0, 0] = float("nan")
            return scores

    monkeypatch.setitem(TASKS, "shapes", Broken)
    trainer = Trainer(settings(pipeline, "explore=12", "rollout_batch=24"), tmp_path)
    kept = []
    monkeypatch.setattr(nft.trainer, "extremes", lambda *args: (kept.append(extremes(*args)), kept[-1])[1])
    data = trainer.sample()
    # One of the candidates and one of the exact pictures.
    assert data["measured"]["nonfinite_rewards"] == 2 and 0 not in kept[0][0].tolist()


@pytest.mark.parametrize(("objective", "std"), [("nft", "global"), ("rwr", "group")])
def test_filtered_groups_do_not_take_part_in_the_updates(pipeline, tmp_path, objective, std):
    plain = [f"objective={objective}", f"advantage_std={std}", "kl_weight=0.1"]
    trainer = Trainer(settings(pipeline, *plain, *FILTER), tmp_path / "filtered")
    data = trainer.sample()
    assert data["trained"] == [4, 5, 6, 7] and data["measured"]["filtered_groups"] == 1
    rewards = data["scores"][:, 0].double()
    assert rewards[:4].min() >= 0.95 and data["measured"]["reward"] == pytest.approx(rewards.mean().item())
    groups = rewards.view(2, 4)
    # The deviation of all pictures is that of the filtered ones too.
    deviation = rewards.std(correction=0) if std == "global" else groups[1].std(correction=0)
    advantages = (groups[1] - groups[1].mean()) / (deviation + 1e-4)
    expected = {"nft": advantages.clamp(-5, 5) / 10 + 0.5, "rwr": advantages.exp() / advantages.exp().mean()}
    torch.testing.assert_close(data["r"][4:].double(), expected[objective], rtol=1e-4, atol=1e-4)
    # What is filtered could be anything.
    data["x0"][:4] = float("nan")
    data["r"][:4] = float("nan")
    alone = Trainer(settings(pipeline, *plain), tmp_path / "alone")
    rest = {"x0": data["x0"][4:], "r": data["r"][4:], "prompts": data["prompts"][4:], "states": None}
    before = parameters(trainer)
    assert trainer.optimize(data) == alone.optimize({**rest, "trained": [0, 1, 2, 3]})
    assert same(parameters(trainer), parameters(alone)) and not same(parameters(trainer), before)
    assert trainer.step == 3


def test_shared_noise_stays_with_its_prompt(pipeline, tmp_path, monkeypatch):
    trainer = Trainer(settings(pipeline, "shared_noise=true", *FILTER), tmp_path)
    pairs = []
    accumulate = trainer._accumulate
    monkeypatch.setattr(trainer, "_accumulate", lambda data, own: (pairs.extend(own), accumulate(data, own))[1])
    trainer.optimize(trainer.sample())
    assert sorted(i for i, _, _ in pairs) == [4, 4, 5, 5, 6, 6, 7, 7]
    assert len({(t, seed) for _, t, seed in pairs}) == 2


def test_fewer_pictures_than_updates_make_fewer_updates(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline, "updates_per_epoch=7", *FILTER), tmp_path)
    assert trainer.optimize(trainer.sample())["nonfinite_updates"] == 0
    assert trainer.step == 4


@pytest.mark.parametrize("objective", ["nft", "sft"])
def test_an_epoch_with_nothing_left_is_logged_and_changes_nothing(pipeline, tmp_path, objective):
    everything = ["filter_mean=-1.0", "filter_std=10.0", f"objective={objective}"]
    trainer = Trainer(settings(pipeline, *everything), tmp_path)
    before = parameters(trainer)
    trainer.train()
    assert trainer.step == 0 and same(parameters(trainer), before)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "reward" in line]
    assert [line["filtered_groups"] for line in epochs] == [2, 2] and all("loss" not in line for line in epochs)
    assert [line["alarms"] for line in epochs] == [[], []]
    assert write_report(tmp_path).is_file()
    # 8 pictures in 3 rows each, and nothing else.
    assert read_run(tmp_path, trainer.config)["evaluations"].tolist()[-1] == 2 * 8 * 3


def test_the_costs_of_a_run_count_candidates_and_leave_out_what_was_filtered(pipeline, tmp_path, monkeypatch):
    # On a CPU rollouts are filled up to a multiple of 16.
    overrides = ["group_size=8", "explore=16", "explore_steps=2", "old_policy=copy", "kl_weight=0.1", *FILTER]
    trainer = Trainer(settings(pipeline, *overrides), tmp_path)
    drawn, velocity, decoded, decode = [], trainer.policy.velocity, [], trainer.policy.decode
    monkeypatch.setattr(trainer.policy, "velocity", lambda x, *rest: (drawn.append(len(x)), velocity(x, *rest))[1])
    monkeypatch.setattr(trainer.policy, "decode", lambda x: (decoded.append(len(x)), decode(x))[1])
    counts = []
    for _ in range(2):
        trainer.log({"seconds": 0.0, **(data := trainer.sample())["measured"], **trainer.optimize(data)})
        trainer.log({"eval_strict": 0.0})
        counts.append((sum(drawn), sum(decoded)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["filtered_groups"] for line in lines if "reward" in line] == [1, 1]
    found = read_run(tmp_path, trainer.config)
    assert list(zip(found["evaluations"], found["pictures"], strict=True)) == counts


def test_a_resumed_run_equals_an_unbroken_one(pipeline, tmp_path):
    config = settings(pipeline, "explore=7", "explore_steps=2", *FILTER)
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    first = Trainer(config, tmp_path / "parts")
    train_until(first, 1)
    second = Trainer(config, tmp_path / "parts", resume=True)
    second.train()
    assert same(parameters(whole), parameters(second)) and whole.step == second.step == 6


def test_two_processes_train_as_one_does(pipeline, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    changes = ["explore=5", "explore_steps=2", "group_size=3", "updates_per_epoch=2", *FILTER]
    monkeypatch.setattr(distributed_worker, "SETTINGS", [*distributed_worker.SETTINGS, *changes])
    monkeypatch.setattr(distributed_worker, "Brightness", FirstIsDone)
    try:
        distributed_worker.run(tmp_path / "run1", pipeline)
        by_fork(2, lambda: distributed_worker.run(tmp_path / "run2", pipeline))
    finally:
        torch.set_num_threads(threads)
    one, *two = (torch.load(tmp_path / f"run{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for out in two:
        assert out["processes"] == 2
        for name, tolerance in (("x0", 1e-5), ("r", 1e-4), ("trained", 1e-6), ("old", 1e-6), ("ema", 1e-6)):
            for ours, theirs in zip(out[name], one[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5 if name != "r" else 1e-4, atol=tolerance)
        assert all(same(out[name], two[0][name]) for name in ("x0", "r", "trained", "old", "ema"))
    lines = [(tmp_path / f"run{count}" / "metrics.jsonl").read_text().splitlines() for count in (1, 2)]
    for ours, theirs in zip(*(map(json.loads, each) for each in lines), strict=True):
        assert ours.keys() == theirs.keys() and ours["step"] == theirs["step"]
        assert "reward" not in ours or ours["filtered_groups"] == 1
        for name in ours.keys() & {"explore_reward", "reward", "filtered_groups", "loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["explore=12"], "explore: got 12, accepted are numbers above 12, group_size"),
        (["explore_steps=4"], "explore_steps: got 4 without explore"),
        (["explore_float8=true", "fused_transformer=true"], "explore_float8: got True without explore, accepted"),
        (["explore=24", "explore_float8=true"], "explore_float8: got true, it needs fused_transformer=true"),
        (["explore=24", "explore_steps=11"], "explore_steps: got 11, accepted are 1 to 10, rollout_steps"),
        (
            ["explore=24", "explore_steps=4", "rollout_solver=flow-sde"],
            "explore_steps: got 4, but flow-sde draws noise in its steps; accepted is 10, rollout_steps",
        ),
        (
            ["explore=24", "explore_steps=4", "rollout_solver=mixed", "rollout_options={window: [8, 8]}"],
            "rollout_solver: got mixed with options {'window': [8, 8]}, which it does not take: window",
        ),
        (["filter_mean=high"], "filter_mean: got 'high'"),
        (["filter_mean=0.9", "filter_std=0"], "filter_std: got 0"),
        (["stages=[{epochs: 2, explore: 5}]"], "stages.0.explore: got 5, accepted are numbers above 12"),
    ],
)
def test_settings_that_contradict_each_other_are_named(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config("shapes", overrides)
    assert message in str(caught.value)


def test_noise_in_equal_steps_and_a_solver_that_draws_none_are_accepted():
    load_config("shapes", ["explore=24", "explore_steps=10", "rollout_solver=flow-sde"])
    load_config("shapes", ["explore=24", "rollout_solver=flow-sde"])
    load_config("shapes", ["explore=24", "explore_steps=1", "rollout_solver=ddim"])
