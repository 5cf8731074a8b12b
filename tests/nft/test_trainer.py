"""The trainer on an untrained tiny pipeline: every step of the real code, a few pictures at a time."""

import json
import math
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
from distributed_worker import Brightness, Chance, train_until

pytest.importorskip("diffusers")

import peft
from diffusers import StableDiffusion3Pipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import nft.objectives.nft
from nft import checkpoint
from nft.config import ConfigError, load_config
from nft.policy import Policy, old_policy_decay, times
from nft.report import write_report
from nft.rollout import rollout
from nft.surroundings import changes, fingerprint, surroundings
from nft.tasks import TASKS
from nft.trainer import Trainer

SMALL = ["prompts_per_epoch=2", "group_size=3", "rollout_steps=3", "timesteps_per_sample=2", "micro_batch=5",
         "eval_prompts_per_group=1", "eval_steps=2", "eval_every=2", "lora_rank=4"]  # fmt: skip


@pytest.fixture(scope="module")
def policy(pipeline):
    return Policy(settings(pipeline))


def settings(pipeline, *overrides):
    return load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides])


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)


def parameters(trainer):
    return [p.detach().clone() for p in trainer.policy.trained]


def test_interrupted_and_resumed_run_equals_an_unbroken_one(pipeline, tmp_path):
    whole = Trainer(settings(pipeline, "epochs=3"), tmp_path / "whole")
    whole.train()
    first = Trainer(settings(pipeline, "epochs=3"), tmp_path / "parts")
    train_until(first, 1)
    second = Trainer(settings(pipeline, "epochs=3"), tmp_path / "parts", resume=True)
    assert second.epoch == 1
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(parameters(whole), whole.policy._old, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 2, 3, 3]
    assert "eval_strict" in lines[0] and "reward" in lines[1]
    assert write_report(tmp_path / "whole").read_text().count("data:image/png") == 2


def test_the_preflight_is_before_the_first_epoch_only(pipeline, tmp_path, monkeypatch):
    """On resume it would draw and score once more, for a run that has shown that it can."""
    looked = []
    monkeypatch.setattr("nft.trainer.preflight", lambda trainer: looked.append(trainer.epoch))
    config = settings(pipeline, "epochs=2", "eval_every=5")
    train_until(Trainer(config, tmp_path), 1)
    assert looked == [0]
    Trainer(config, tmp_path, resume=True).train()
    assert looked == [0]


def test_other_numbers_of_processes_are_other_surroundings():
    one, three = (surroundings(torch.device("cpu"), count) for count in (1, 3))
    assert changes(one, three) == ["processes 3 (was 1)"] and changes(one, one) == []


def test_a_run_that_is_resumed_elsewhere_says_what_differs(pipeline, tmp_path, monkeypatch):
    train_until(Trainer(settings(pipeline, "epochs=2"), tmp_path / "run"), 1)
    here = Trainer(settings(pipeline, "epochs=2"), tmp_path / "run", resume=True)
    assert here.changes == []
    threads, version = torch.get_num_threads(), peft.__version__
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.setattr(peft, "__version__", "0.0.1")
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "reference")
    there = Trainer(settings(pipeline, "epochs=2"), tmp_path / "run", resume=True)
    assert f"threads 77 (was {threads})" in there.changes and f"peft 0.0.1 (was {version})" in there.changes
    assert any(change.startswith("kernels reference, ") for change in there.changes)


@pytest.mark.parametrize("change", ["lora_rank=8", "lora_alpha=8"])
def test_an_adapter_of_another_size_or_scale_is_no_resumed_one(pipeline, tmp_path, change):
    Trainer(settings(pipeline, "epochs=1", "eval_every=1", "preflight=false"), tmp_path / "run").train()
    key, _, value = change.partition("=")
    with pytest.raises(ValueError, match=f"{key}: got {value}, but .*run was trained with .*cannot be changed"):
        Trainer(settings(pipeline, "epochs=2", change), tmp_path / "run", resume=True)


@pytest.mark.parametrize("every", [1, 5])
def test_a_resumed_run_goes_on_in_torchs_own_stream(pipeline, tmp_path, monkeypatch, every):
    monkeypatch.setitem(TASKS, "shapes", Chance)
    config = settings(pipeline, "epochs=2", f"eval_every={every}", "preflight=false", "verify_kernels_steps=0")
    whole = Trainer(config, tmp_path / "whole")
    whole.train()
    first = Trainer(config, tmp_path / "parts")
    train_until(first, 1)
    torch.manual_seed(99)
    second = Trainer(config, tmp_path / "parts", resume=True)
    second.train()
    assert all(map(torch.equal, whole.policy.trained, second.policy.trained))


def test_a_pipeline_may_move_and_one_of_other_weights_is_refused(pipeline, tmp_path):
    train_until(Trainer(settings(pipeline, "epochs=2"), tmp_path / "run"), 1)
    shutil.copytree(pipeline, tmp_path / "moved")
    moved = Trainer(settings(tmp_path / "moved", "epochs=2", "dtype=bfloat16"), tmp_path / "run", resume=True)
    assert moved.epoch == 1 and moved.changes == []
    for part in ("transformer", "vae", "text_encoder"):
        path = next((tmp_path / "moved" / part).glob("*.safetensors"))
        before = path.read_bytes()
        weights = load_file(path)
        name, weight = max(weights.items(), key=lambda item: item[1].numel())
        save_file({**weights, name: weight * 1.01}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"pipeline: got .*moved, whose weights are others than those that .*run"):
            Trainer(settings(tmp_path / "moved", "epochs=2"), tmp_path / "run", resume=True)
        path.write_bytes(before)


def test_a_fingerprint_is_of_all_that_is_saved():
    """A network's tables of positions and averages are no parameters, but its pictures depend on them."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    before = fingerprint([module])
    for values in (module[0].weight.data.view(-1), module[1].running_mean):
        for i in range(len(values)):
            values[i] += 0.5
            assert fingerprint([module]) != before
            values[i] -= 0.5
    assert fingerprint([module]) == before


def test_every_task_group_has_as_many_prompts_over_the_epochs(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline, "prompts_per_epoch=4"), tmp_path)
    tags = {entry["prompt"]: entry["tag"] for group in trainer.groups for entry in group}
    drawn = []
    for trainer.epoch in range(3):
        drawn += [tags[prompt] for prompt in trainer.sample()["prompts"][:: trainer.stage.group_size]]
    assert len(trainer.groups) == 6 and {drawn.count(tag) for tag in tags.values()} == {2}


def test_an_epoch_keeps_no_more_pictures_than_are_scored_at_a_time(pipeline, tmp_path, monkeypatch):
    trainer = Trainer(settings(pipeline, "rollout_batch=2", "explore=4"), tmp_path)
    decode, drawn, alive = trainer.policy.decode, [], []

    def watched(latents):
        alive.append(sum(picture() is not None for picture in drawn))
        pictures = decode(latents)
        drawn.append(weakref.ref(pictures))
        return pictures

    monkeypatch.setattr(trainer.policy, "decode", watched)
    trainer.sample()
    assert len(drawn) == 7 and max(alive) == 1


def test_updates_that_are_all_skipped_have_no_means(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline), tmp_path)
    data = trainer.sample()
    data["x0"] = data["x0"] * math.nan
    trainer.alarms.thresholds["nonfinite_updates"] = 99
    metrics = trainer.optimize(data)
    assert metrics == {"nonfinite_updates": trainer.stage.updates_per_epoch}


def test_checkpoints_that_cannot_be_seen_do_not_begin_a_run_anew(pipeline, tmp_path):
    """As where their disk is not mounted."""
    train_until(Trainer(settings(pipeline), tmp_path / "run"), 1)
    kept, log = tmp_path / "run" / "checkpoints", (tmp_path / "run" / "metrics.jsonl").read_text()
    kept.rename(tmp_path / "elsewhere")
    for make in (lambda: kept.symlink_to("/mnt/nowhere"), kept.touch):
        make()
        with pytest.raises(FileNotFoundError, match=r"resume: .*checkpoints is no folder that can be read"):
            Trainer(settings(pipeline), tmp_path / "run", resume=True)
        kept.unlink()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log
    (tmp_path / "elsewhere").rename(kept)
    assert Trainer(settings(pipeline), tmp_path / "run", resume=True).epoch == 1
    # One under another's number is damaged.
    (first,) = checkpoint.existing(kept)
    shutil.copytree(first, kept / "epoch-000050")
    with pytest.raises(checkpoint.CheckpointError, match="it is of epoch 1"):
        Trainer(settings(pipeline), tmp_path / "run", resume=True)


def test_a_folder_is_one_processs(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline, "epochs=1"), tmp_path)
    code = f"from nft.files import lock; from pathlib import Path; lock(Path({str(tmp_path)!r}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 1 and "another process trains in" in other.stderr
    trainer.train()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_window_of_one_step_is_a_valid_setting(pipeline, tmp_path):
    one = ["rollout_solver=mixed", "window=1", "rollout_steps=1", "timesteps_per_sample=1"]
    assert Trainer(settings(pipeline, *one), tmp_path).sample()["x0"].isfinite().all()


def test_stages_change_the_settings_and_are_resumed_at_any_epoch(pipeline, tmp_path):
    stages = "stages=[{epochs: 1}, {epochs: 2, rollout_steps: 4, timesteps_per_sample: 3, learning_rate: 0.01}]"
    whole = Trainer(settings(pipeline, stages), tmp_path / "whole")
    seen = []
    whole.train(lambda metrics: seen.append((whole.epoch, len(whole.grid), whole.optimizer.param_groups[0]["lr"])))
    assert seen == [(0, 4, 1e-3), (1, 4, 1e-3), (2, 5, 0.01), (2, 5, 0.01), (3, 5, 0.01), (3, 5, 0.01)]
    for stop in (1, 2):
        first = Trainer(settings(pipeline, stages), tmp_path / str(stop))
        train_until(first, stop)
        second = Trainer(settings(pipeline, stages), tmp_path / str(stop), resume=True)
        second.train()
        assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True))
        assert second.alarms.state() == whole.alarms.state()


# The last epoch of a stage, and one that is also its first.
@pytest.mark.parametrize("epoch", [2, 3])
def test_an_epoch_that_is_interrupted_in_its_evaluation_is_kept_and_evaluated_on_resume(pipeline, tmp_path, epoch):
    stages = "stages=[{epochs: 2}, {epochs: 1, eval_prompts_per_group: 2}]"
    whole = Trainer(settings(pipeline, stages), tmp_path / "whole")
    whole.train()
    first = Trainer(settings(pipeline, stages), tmp_path / "parts")
    evaluate = first.evaluate

    def interrupt():
        if first.epoch == epoch:
            raise KeyboardInterrupt
        return evaluate()

    first.evaluate = interrupt
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = Trainer(settings(pipeline, stages), tmp_path / "parts", resume=True)
    assert second.epoch == epoch
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(second), strict=True))
    assert second.alarms.state() == whole.alarms.state()
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    a, b = ([{**json.loads(line), "seconds": 0} for line in lines] for lines in logs)
    assert a == b and sum("eval_strict" in line for line in a) == 3
    for name in ("checkpoint", "best"):
        about = [checkpoint.manifest(tmp_path / run / name) for run in ("whole", "parts")]
        assert all(one["score"] is not None for one in about)
        assert [one["epoch"] for one in about] == [about[0]["epoch"]] * 2


def test_base_weights_never_change(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline, "epochs=1"), tmp_path / "run")
    base = {n: p.clone() for n, p in trainer.policy.transformer.named_parameters() if "lora" not in n}
    trainer.train()
    now = dict(trainer.policy.transformer.named_parameters())
    assert base and all(torch.equal(p, now[n]) for n, p in base.items())


def test_adapters_start_without_effect_and_old_follows(policy):
    x, t = torch.randn(2, *policy.latent_shape), torch.tensor([0.2, 0.8])
    embeds, pooled = policy.embed(["a red circle", "two blue squares"])

    def velocity(adapter):
        policy.use(adapter)
        with torch.no_grad():
            return policy.velocity(x, t, embeds, pooled)

    assert torch.equal(velocity("default"), velocity(None)) and torch.equal(velocity("old"), velocity(None))
    before = [p.detach().clone() for p in policy.trained]
    with torch.no_grad():
        for p in policy.trained:
            p.add_(0.1)
    assert not torch.equal(velocity("default"), velocity("old"))
    policy.update_old(0.75)
    for old, start, new in zip(policy._old, before, policy.trained, strict=True):
        torch.testing.assert_close(old.detach(), 0.75 * start + 0.25 * new.detach())
    policy.update_old(0.0)
    assert torch.equal(velocity("default"), velocity("old"))


def test_half_precision_base_keeps_float32_adapters_and_trains(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline, "dtype=bfloat16", "resolution=32", "gradient_checkpointing=true"), tmp_path)
    weights = dict(trainer.policy.transformer.named_parameters())
    assert {p.dtype for n, p in weights.items() if "lora" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in weights.items() if "lora" in n} == {torch.float32}
    before = parameters(trainer)
    data = trainer.sample()
    assert data["x0"].dtype == torch.float32 and data["x0"].shape[1:] == trainer.policy.latent_shape == (16, 4, 4)
    assert trainer.policy.decode(data["x0"]).shape[1:] == (32, 32, 3)
    trainer.optimize(data)
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))


def test_sd35_run_has_the_papers_settings_and_needs_weights(tmp_path):
    c = load_config("sd35_geneval")
    assert (c.lora_rank, c.lora_alpha, c.prompts_per_epoch, c.group_size) == (32, 64, 48, 24)
    assert (c.rollout_steps, c.timesteps_per_sample, c.learning_rate, c.dtype) == (10, 9, 3e-4, "bfloat16")
    with pytest.raises(FileNotFoundError, match="accept the model's licence and run `hf download`, or give a folder"):
        # The reward's weights, which would be missed first, are not those of this test.
        Trainer(
            load_config("sd35_geneval", ["pipeline=/nowhere", "task=shapes", "prompts=null", "rewards={}"]), tmp_path
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named(pipeline):
    with pytest.raises(ValueError, match="device: got 'cuda', but this machine has no usable GPU"):
        Policy(settings(pipeline, "device=cuda"))


def test_solver_options_reach_the_solver_and_are_checked_before_any_work(pipeline, tmp_path):
    with pytest.raises(TypeError, match="eta"):
        Trainer(settings(pipeline, "rollout_solver=euler", "rollout_options={eta: 0.5}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    latents = [
        Trainer(settings(pipeline, "rollout_solver=ddim", f"rollout_options={{eta: {eta}}}"), tmp_path / eta).sample()
        for eta in ("0.0", "0.9")
    ]
    assert not torch.equal(latents[0]["x0"], latents[1]["x0"])


@pytest.mark.parametrize("resolution", [40, 80])
def test_a_resolution_that_the_transformer_does_not_take_is_named(pipeline, resolution):
    with pytest.raises(ValueError, match=f"resolution: got {resolution}, accepted are multiples of 16 up to 64"):
        Policy(settings(pipeline, f"resolution={resolution}"))


@pytest.mark.parametrize("before", ["set_adapter", "disable_adapters"])
@pytest.mark.parametrize("adapter", ["default", "old", None])
def test_an_adapter_is_chosen_as_by_peft_whatever_was_before(policy, adapter, before):
    x, t, conditions = torch.randn(1, *policy.latent_shape), torch.tensor([0.4]), policy.embed(["a red circle"])
    with torch.no_grad():
        for parameter in (*policy.trained, *policy._old):
            parameter.add_(0.05 * torch.randn_like(parameter))

    def switch(name):
        if name is None:
            policy.transformer.disable_adapters()
        else:
            policy.transformer.enable_adapters()
            policy.transformer.set_adapter(name)

    switch(adapter)
    expected = policy.velocity(x, t, *conditions)
    switch("old" if before == "set_adapter" else None)
    policy.use(adapter)
    assert torch.equal(policy.velocity(x, t, *conditions), expected)
    assert all(parameter.requires_grad == (adapter == "default") for parameter in policy.trained)
    assert not any(parameter.requires_grad for parameter in policy._old)
    assert adapter is None or policy.transformer.active_adapters() == [adapter]
    with pytest.raises(ValueError, match="adapter: got 'other', accepted are None, default, old"):
        policy.use("other")


def test_merged_weights_sample_as_the_adapter_does_and_leave_the_base_as_it_was(policy, pipeline):
    x, t = torch.randn(2, *policy.latent_shape), torch.tensor([0.2, 0.8])
    embeds, pooled = policy.embed(["a red circle", "two blue squares"])
    base = {n: p.clone() for n, p in policy.transformer.named_parameters() if "lora" not in n}
    with torch.no_grad():
        for p in policy.trained:
            p.add_(0.05 * torch.randn_like(p))
        policy.use("default")
        adapted = policy.velocity(x, t, embeds, pooled)
        with policy.merged("default"):
            merged = policy.velocity(x, t, embeds, pooled)
        policy.use(None)
        assert (adapted - policy.velocity(x, t, embeds, pooled)).abs().max() > 1e-2
        exact = StableDiffusion3Pipeline.from_pretrained(pipeline).transformer.double()
        for name, layer in policy.transformer.named_modules():
            if isinstance(layer, LoraLayer):
                down, up = (part["default"].weight.double() for part in (layer.lora_A, layer.lora_B))
                exact.get_submodule(name).weight.data += layer.scaling["default"] * up @ down
        wanted = exact(x.double(), embeds.double(), pooled.double(), 1000 * t.double(), return_dict=False)[0]
    rounding = (adapted - wanted).abs().max()
    assert rounding < 1e-4 and (merged - wanted).abs().max() <= 4 * rounding
    with pytest.raises(KeyboardInterrupt), policy.merged("old"):
        raise KeyboardInterrupt
    now = dict(policy.transformer.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in base.items())


def test_old_policy_is_not_evaluated_while_it_equals_the_trained_one(pipeline, tmp_path, monkeypatch):
    """With ``copy`` the first update of every epoch needs no forward of the old policy, and the rest do."""
    trainer = Trainer(settings(pipeline, "old_policy=copy", "updates_per_epoch=2", "verify_kernels_steps=0"), tmp_path)
    used, use = [], trainer.policy.use
    monkeypatch.setattr(trainer.policy, "use", lambda adapter: (used.append((trainer.step, adapter)), use(adapter)))
    for _ in range(2):
        trainer.optimize(trainer.sample())
    steps_with_old = {step for step, adapter in used if adapter == "old"}
    assert steps_with_old == {1, 3}


def test_embeddings_are_kept_for_the_prompts_that_came_last(policy, monkeypatch):
    encode, encoded = policy.model.encode, []

    def recorded(texts, *rest):
        # Blocks are filled up with their last one.
        encoded.append(list(dict.fromkeys(texts)))
        return encode(texts, *rest)

    monkeypatch.setattr(policy.model, "encode", recorded)
    policy._conditions.clear()
    first = policy.embed(["a", "b", "a"])
    assert encoded == [["a", "b"]] and torch.equal(first[0][0], first[0][2])
    assert all(map(torch.equal, policy.embed(["a", "b", "a"]), first)) and len(encoded) == 1
    # Room for two.
    monkeypatch.setattr("nft.policy.KEPT_BYTES", 2 * sum(x[0].nbytes for x in first))
    policy.embed(["c"])
    policy.embed(["b", "c"])
    assert encoded[1:] == [["c"]]
    policy.embed(["a"])
    assert encoded[2:] == [["a"]]


def test_embeddings_that_are_kept_hold_no_more_than_they_are_counted_for(policy):
    policy._conditions.clear()
    for prompt in ("a", "b", "c"):
        policy.embed([prompt] * 24)
    kept = [x for row in policy._conditions.values() for x in row]
    assert sum(x.untyped_storage().nbytes() for x in kept) == sum(x.nbytes for x in kept)


def test_eight_projections_are_adapted(policy):
    names = {n.split(".attn.")[1].split(".lora")[0] for n, _ in policy.transformer.named_parameters() if "lora" in n}
    assert names == {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc", "flow-sde"])
def test_a_picture_depends_on_its_seed_and_prompt_only(policy, solver):
    policy.use(None)
    prompts, seeds, grid = ["a red circle", "a triangle", "two blue squares"], [7, 8, 9], times(3, 1.0)
    whole = rollout(policy, prompts, seeds, grid, solver, 3)
    alone = torch.cat([rollout(policy, prompts[i : i + 1], seeds[i : i + 1], grid, solver, 1) for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_solvers_reach_their_order_on_a_closed_form_velocity():
    """For x0 = N(0, s^2) the velocity is x ((1+s^2) t - s^2) / ((1-t)^2 s^2 + t^2), and x(0) = s x(1)."""

    class Gaussian:
        latent_shape = (1, 1, 1)
        device = torch.device("cpu")

        def embed(self, prompts):
            return torch.zeros(len(prompts), 1), None

        def velocity(self, x, t, embeds, pooled):
            t, s2 = t.double().view(-1, 1, 1, 1), 0.25
            return (x.double() * ((1 + s2) * t - s2) / ((1 - t) ** 2 * s2 + t**2)).float()

    def error(solver, steps):
        seeds = list(range(50))
        start = rollout(Gaussian(), ["x"] * 50, seeds, torch.tensor([1.0]), solver, 50)
        end = rollout(Gaussian(), ["x"] * 50, seeds, times(steps, 1.0), solver, 50)
        return ((end - 0.5 * start).abs() / start.abs()).mean().item()

    assert 1.7 < error("euler", 20) / error("euler", 40) < 2.3
    assert 3.2 < error("heun", 20) / error("heun", 40) < 4.8


def test_the_averaged_weights_follow_by_their_schedule(pipeline, tmp_path, monkeypatch):
    trainer = Trainer(settings(pipeline, "updates_per_epoch=6", "verify_kernels_steps=0"), tmp_path)
    expected, step = [p.detach().double() for p in trainer.policy.trained], trainer.ema.step

    def follow(parameters):
        decay = min((1 + (trainer.step + 1)) / (10 + (trainer.step + 1)), 0.9)
        expected[:] = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(expected, parameters, strict=True)]
        step(parameters)

    monkeypatch.setattr(trainer.ema, "step", follow)
    trainer.optimize(trainer.sample())
    assert trainer.step == 6
    for got, wanted in zip(trainer.ema.shadow_params, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("counts", "expected"), [("epochs", [1, 2, 3]), ("updates", [2, 4, 6])])
def test_the_old_policy_follows_by_epochs_or_by_updates(pipeline, tmp_path, monkeypatch, counts, expected):
    overrides = ["epochs=3", "updates_per_epoch=2", f"old_policy_counts={counts}"]
    trainer, decays = Trainer(settings(pipeline, *overrides), tmp_path), []
    monkeypatch.setattr(trainer.policy, "update_old", decays.append)
    trainer.train()
    assert decays == pytest.approx([0.001 * count for count in expected])


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("copy", {0: 0, 500: 0}),
        ("linear_0.5", {0: 0, 100: 0.1, 900: 0.5}),
        ("delayed_0.999", {74: 0, 75: 0, 95: 0.15, 999: 0.999}),
    ],
)
def test_old_policy_schedules(schedule, values):
    for step, eta in values.items():
        assert old_policy_decay(schedule, step) == pytest.approx(eta)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "learning_rat: unknown key, did you mean learning_rate?"),
        ("group_size=1", "group_size: got 1, "),
        ("learning_rate=fast", "learning_rate: got 'fast'"),
        ("weighting=t3", "weighting: got 't3'"),
        ("epochs", "override: got 'epochs'"),
    ],
)
def test_bad_configuration_is_named(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config("shapes", [override])
    assert message in str(caught.value)


def test_numbers_in_exponent_notation_are_numbers():
    assert load_config("shapes", ["learning_rate=3e-4"]).learning_rate == 3e-4


def test_missing_pipeline_and_existing_run_are_named(pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="pipeline: got '/nowhere'"):
        Policy(settings("/nowhere"))
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileExistsError, match="holds a run already"):
        Trainer(settings(pipeline), tmp_path)
    with pytest.raises(FileNotFoundError, match="none holds no config"):
        Trainer(settings(pipeline), tmp_path / "none", resume=True)
    with pytest.raises(FileExistsError, match=r"output: .*metrics.jsonl is a file; give a folder"):
        Trainer(settings(pipeline), tmp_path / "metrics.jsonl")


def test_metrics_are_means_of_the_updates_that_were_finite(pipeline, tmp_path, monkeypatch):
    trainer, names = (
        Trainer(settings(pipeline, "updates_per_epoch=3"), tmp_path),
        ("loss", "old_deviation", "grad_norm"),
    )
    values = iter([1.0, float("nan"), 4.0])

    def update(*_):
        value = next(values)
        return dict.fromkeys((*names, "velocity_rms"), value)

    data = trainer.sample()
    monkeypatch.setattr(trainer, "_accumulate", lambda *_: None)
    monkeypatch.setattr(trainer, "_update", update)
    metrics = trainer.optimize(data)
    assert [metrics[name] for name in names] == [2.5] * 3 and metrics["nonfinite_updates"] == 1


@pytest.mark.parametrize("objective", ["nft", "positive"])
def test_the_first_steps_are_compared_with_the_reference_and_no_others(pipeline, tmp_path, monkeypatch, objective):
    options = ["updates_per_epoch=3", "verify_kernels_steps=2", "dtype=bfloat16", f"objective={objective}"]
    trainer = Trainer(settings(pipeline, *options), tmp_path)
    compared, seen, module = [], [], f"nft.objectives.{objective}"
    monkeypatch.setattr(f"{module}.compare_nft_loss", lambda *_, **__: compared.append(trainer.step))
    real = nft.objectives.nft.nft_loss

    def looked_at(v_theta, v_old, x_t, *others, **options):
        seen.append((v_theta.dtype, x_t.dtype))
        return real(v_theta, v_old, x_t, *others, **options)

    monkeypatch.setattr(f"{module}.nft_loss", looked_at)
    trainer.optimize(trainer.sample())
    assert set(compared) == {0, 1} and trainer.step == 3
    # The loss has x_t as it was before the model rounded it.
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_a_stage_brings_its_optimizer_settings_and_forgets_the_scores_before(pipeline, tmp_path, monkeypatch):
    stages = "stages=[{epochs: 1}, {epochs: 1, learning_rate: 0.02, weight_decay: 0.5}]"
    trainer = Trainer(settings(pipeline, stages, "preflight=false"), tmp_path)
    found, restart = [], trainer.alarms.restart

    def restarted():
        found.append(trainer.epoch)
        restart()

    monkeypatch.setattr(trainer.alarms, "restart", restarted)
    trainer.train()
    assert found == [1]
    assert [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups] == [(0.02, 0.5)]
    # By which the best of a stage is told from another's.
    kept = checkpoint.existing(tmp_path / "checkpoints")
    assert [checkpoint.manifest(folder)["stage"] for folder in kept] == [0, 1]
