"""The trainer with a task of several rewards, which are scored beside the sampling."""

import math
import socket
import sys

import pytest
import torch

pytest.importorskip("diffusers")

from typer.testing import CliRunner

from nft import tasks, trainer
from nft.checkpoint import manifest
from nft.cli import app
from nft.config import load_config
from nft.rewards.base import RewardError
from nft.trainer import Trainer
from nft.worlds.shapes.tiny import build_pipeline

SMALL = ["prompts_per_epoch=2", "group_size=3", "rollout_steps=3", "rollout_batch=4", "timesteps_per_sample=2",
         "eval_prompts_per_group=1", "eval_steps=2", "lora_rank=4", "epochs=1"]  # fmt: skip
REWARDS = [
    "task=rewards",
    "prompts=shapes",
    "rewards={jpeg: 1.0, plain: {reward: jpeg, weight: 0.5, options: {quality: 10}}}",
]


@pytest.fixture
def run(tmp_path):
    build_pipeline().save_pretrained(tmp_path / "pipeline")
    made = []

    def make(*overrides):
        settings = load_config("shapes", [f"pipeline={tmp_path / 'pipeline'}", *SMALL, *REWARDS, *overrides])
        made.append(Trainer(settings, tmp_path / "run"))
        return made[-1]

    yield make
    for one in made:
        one.task.close()


def test_rewards_of_all_batches_are_combined_within_their_groups(run):
    """GDPO: r = clip(sum_k w_k (R_k - mean) / (std + 1e-4) / 10 + 1/2) with each group's own mean and biased std."""
    one = run("combine=gdpo")
    data = one.sample()
    assert data["scores"].shape == (6, 3)
    rewards = data["scores"][:, :2].double().view(2, 3, 2)
    assert (rewards.std(1) > 0).all()
    centred = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    expected = ((centred * torch.tensor([1.0, 0.5])).sum(2) / 10 + 0.5).clamp(0, 1).flatten()
    torch.testing.assert_close(data["r"].double(), expected, rtol=0, atol=1e-5)
    assert data["measured"]["reward"] == pytest.approx((rewards * torch.tensor([1.0, 0.5])).sum(2).mean().item())
    for k, name in enumerate(("jpeg", "plain")):
        assert data["measured"][f"reward_{name}"] == pytest.approx(rewards[..., k].mean().item())


def test_r_of_each_reward_is_made_by_the_settings_and_averaged(run):
    one = run("combine=per_reward", "adv_clip_max=0.2", "advantage_mode=positive_only", "advantage_std=group")
    data = one.sample()
    rewards = data["scores"][:, :2].double().view(2, 3, 2)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-4)
    each = advantages.clamp(0, 0.2) / 0.4 + 0.5
    expected = ((each * torch.tensor([1.0, 0.5])).sum(2) / 1.5).flatten()
    assert (advantages > 0.2).any() and ((advantages > 0) & (advantages < 0.2)).any() and (advantages < 0).any()
    torch.testing.assert_close(data["r"].double(), expected, rtol=0, atol=1e-5)


def test_candidates_are_kept_by_all_rewards_and_their_weights(run, monkeypatch):
    """1.0 and 0.5 of these scores make 0, 6, 2 and 1, and 9, 7.5, 2 and 3."""
    one = run("group_size=2", "explore=4")
    first, second = [0.0, 1.0, 2.0, 3.0, 3.0, 2.5, 2.0, 1.0], [0.0, 10.0, 0.0, -4.0, 12.0, 10.0, 0.0, 4.0]
    scores = torch.stack([torch.tensor(column) for column in (first, second, first)], 1)
    monkeypatch.setattr(one, "_draw", lambda *_, **__: (None, scores))
    index, measured = one._explore([{}] * 8, [0] * 8, 4)
    assert index == [0, 1, 4, 6]
    assert measured["explore_reward"] == pytest.approx((0 + 6 + 2 + 1 + 9 + 7.5 + 2 + 3) / 8)


FLAKY = """import torch
from nft.rewards.base import Reward

class Flaky(Reward):
    threaded = True
    all_of_them = False

    def __call__(self, pictures, prompts, metadata):
        score = pictures.float().mean((1, 2, 3)) / 255
        score[slice(None) if self.all_of_them else slice(1, None, 4)] = float("nan")
        return score
"""


def test_scores_that_are_not_finite_are_counted_and_end_a_run_only_if_all_are(run, tmp_path, monkeypatch):
    (tmp_path / "flaky_reward.py").write_text(FLAKY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Of two batches, of four and of two pictures, the second of each.
    one = run("rewards={flaky: {reward: 'flaky_reward:Flaky'}}", "preflight=false", "eval_prompts_per_group=2")
    data, found = one.sample(), []
    scores = data["scores"][:, 0].view(2, 3)
    rest = torch.tensor([[True, False, True], [True, True, False]])
    assert data["measured"]["nonfinite_rewards"] == 2
    expected = torch.stack([group[kept].mean() for group, kept in zip(scores, rest, strict=True)])
    torch.testing.assert_close(scores[~rest], expected)
    assert data["measured"]["strict"] == pytest.approx(scores[rest].mean().item())
    one.train(found.append)
    assert any(message.startswith("nonfinite_rewards: ") for metrics in found for message in metrics["alarms"])
    scored = [line for line in found if "eval_strict" in line]
    assert len(scored) == 2 and all(math.isfinite(line["eval_strict"]) for line in scored)
    monkeypatch.setattr("flaky_reward.Flaky.all_of_them", True)
    with pytest.raises(RewardError, match=r"rewards.flaky: none of 6 scores is finite"):
        one.sample()


def test_a_reward_of_weight_zero_is_only_watched(run, tmp_path):
    """It is logged and compared at evaluations, and trains nothing."""
    watched = "rewards={jpeg: 1.0, other: {reward: jpeg, weight: 0.0, options: {quality: 10}}}"
    one = run("epochs=2", "eval_every=1", watched)
    data = one.sample()
    scores = data["scores"].view(2, 3, 3)
    assert scores[..., 1].std() > 0 and not torch.equal(scores[..., 0], scores[..., 1])
    assert data["measured"]["reward"] == pytest.approx(scores[..., 0].mean().item())
    assert data["measured"]["reward_other"] == pytest.approx(scores[..., 1].mean().item())
    advantages = scores[..., 0] - scores[..., 0].mean(1, keepdim=True)
    r = (advantages / (scores[..., 0].std(correction=0) + 1e-4) / 10 + 0.5).clamp(0, 1)
    torch.testing.assert_close(data["r"], r.flatten(), rtol=0, atol=1e-5)
    seen = []
    one.train(seen.append)
    evaluations = [line for line in seen if "eval_strict" in line]
    assert len(evaluations) == 3 and {"eval_reward_jpeg", "eval_reward_other_std"} < evaluations[0].keys()
    held_out = manifest(tmp_path / "run" / "checkpoint")["held_out"]
    assert held_out == {
        name: [evaluations[-1][f"eval_{name}"], evaluations[-1][f"eval_{name}_std"]]
        for name in ("strict", "reward_other")
    }
    assert one.alarms.state()["best"].keys() == {"strict", "reward_other"}
    again = Trainer(one.config, tmp_path / "run", resume=True)
    again.task.close()
    assert again.alarms.state() == one.alarms.state()


def test_a_server_that_is_not_there_is_named_before_the_pipeline_is_loaded(tmp_path, monkeypatch):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        free = sock.getsockname()[1]
    monkeypatch.setattr(trainer, "Policy", None)
    remote = f"rewards={{far: {{reward: 'http://127.0.0.1:{free}/x', options: {{patience: 0.1}}}}}}"
    with pytest.raises(RewardError, match=rf"reward server http://127.0.0.1:{free}: no answer in 0.1 s"):
        Trainer(load_config("shapes", ["task=rewards", "prompts=shapes", remote]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    judge = f"rewards={{unifiedreward: {{options: {{url: 'http://127.0.0.1:{free}/v1'}}}}}}"
    with pytest.raises(RewardError, match=rf"no server answers at http://127.0.0.1:{free}/v1 \(ConnectError\)"):
        Trainer(load_config("shapes", ["task=rewards", "prompts=shapes", judge]), tmp_path / "run")
    # One of a later stage may be started by then.
    stages = "stages=[{epochs: 1, task: shapes, prompts: null, rewards: {}}, {epochs: 1}]"
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        Trainer(load_config("shapes", ["task=rewards", "prompts=shapes", remote, stages]), tmp_path / "run")


def test_a_reward_that_fails_is_asked_again_and_then_named(run, monkeypatch):
    monkeypatch.setattr(trainer, "_WAITS", (0.0, 0.0))
    one = run()
    gather, failures = one.task.gather, [3]

    def failing():
        if failures[0]:
            failures[0] -= 1
            raise RewardError("reward jpeg: gone")
        return gather()

    monkeypatch.setattr(one.task, "gather", failing)
    with pytest.raises(RewardError, match="reward jpeg: gone"):
        one.sample()
    gather()
    failures[0] = 2
    assert one.sample()["scores"].shape == (6, 3)


def test_a_run_that_a_reward_ended_draws_the_same_pictures_when_it_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_WAITS", ())
    one = run("epochs=2")

    def gone():
        raise RewardError("reward jpeg: gone")

    def end(metrics):
        if "seconds" in metrics:
            monkeypatch.setattr(one.task, "gather", gone)

    with pytest.raises(RewardError, match="reward jpeg: gone; --resume draws the same pictures again"):
        one.train(end)
    one.task.close()
    resumed = Trainer(one.config, tmp_path / "run", resume=True)
    unbroken = Trainer(one.config, tmp_path / "other")
    assert resumed.epoch == 1
    for each in (resumed, unbroken):
        each.train()
        each.task.close()
    assert all(map(torch.equal, resumed.policy.trained, unbroken.policy.trained))


def test_a_later_stage_s_prompts_are_looked_for_at_the_start(run, tmp_path):
    stages = "[{epochs: 1}, {epochs: 1, prompts: /nowhere.txt, held_out_prompts: shapes}]"
    with pytest.raises(OSError, match="nowhere"):
        tasks.check(load_config("shapes", [*SMALL[:-1], *REWARDS, f"stages={stages}"]).all_stages()[1])
    with pytest.raises(OSError, match="nowhere"):
        build_pipeline().save_pretrained(tmp_path / "again")
        settings = [f"pipeline={tmp_path / 'again'}", *SMALL[:-1], *REWARDS, f"stages={stages}"]
        Trainer(load_config("shapes", settings), tmp_path / "other")


def test_a_later_stage_s_prompts_that_are_spoilt_meanwhile_end_the_run_in_one_line(tmp_path, monkeypatch):
    build_pipeline().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "mine.txt").write_text("a cat\n")
    stages = f"[{{epochs: 1}}, {{epochs: 1, prompts: {tmp_path / 'mine.txt'}, held_out_prompts: shapes}}]"
    save = Trainer.save

    def spoilt(trainer):
        save(trainer)
        (tmp_path / "mine.txt").write_text("")

    monkeypatch.setattr(Trainer, "save", spoilt)
    settings = [f"pipeline={tmp_path / 'pipeline'}", *SMALL[:-1], *REWARDS[:2], "rewards={jpeg: 1.0}"]
    output = ["--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["train", *settings, f"stages={stages}", "preflight=false", *output])
    assert result.exit_code == 2 and "mine.txt is empty, accepted is at least one prompt" in result.output
    # What no setting is to blame for keeps its traceback.
    monkeypatch.setattr(Trainer, "save", lambda trainer: int("x"))
    result = CliRunner().invoke(
        app, ["train", *settings, "epochs=1", "preflight=false", "--output", str(tmp_path / "b")]
    )
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["rewards={jpg: 1.0}"], "rewards.jpg: unknown reward jpg, did you mean jpeg"),
        (["rewards={jpeg: {wight: 1.0}}"], "rewards.jpeg.wight: unknown key"),
        (["rewards={jpeg: {workers: 0}}"], "rewards.jpeg.workers: got 0"),
        (["objective=sft", "combine=per_reward"], "combine: got per_reward with objective=sft"),
    ],
)
def test_bad_rewards_are_named(override, message):
    with pytest.raises(ValueError) as caught:
        load_config("shapes", [*SMALL, *REWARDS, *override])
    assert message in str(caught.value)
