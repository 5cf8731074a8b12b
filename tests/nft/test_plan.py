"""The plan against what a trainer really does: FLOPs by torch's counter, evaluations by counting calls."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("diffusers")

from diffusers import SD3Transformer2DModel
from distributed_worker import Brightness

from nft.config import ConfigError, load_config
from nft.plan import plan, plan_stages
from nft.policy import Policy
from nft.tasks import TASKS
from nft.trainer import Trainer
from nft.worlds.shapes.tiny import build_pipeline
from nft_kernels.bench import peak_and_launches

# The plan does not know that the fused forward adds adapters of a high rank to the weights, and what it holds.
SMALL = ["prompts_per_epoch=2", "group_size=4", "rollout_steps=3", "timesteps_per_sample=2", "micro_batch=5",
         "eval_prompts_per_group=1", "eval_steps=2", "updates_per_epoch=3", "verify_kernels_steps=0",
         "fused_transformer=false"]  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["kl_weight=0.1"],
        ["gradient_checkpointing=true"],
        ["objective=rwr", "rollout_solver=heun"],
        ["adapter=full", "kl_weight=0.1"],
        ["old_policy=delayed_0.999", "kl_weight=0.1"],
        ["explore=16", "explore_steps=2"],
        ["explore=24", "rollout_solver=heun"],
    ],
)
def test_flops_and_evaluations_are_those_of_an_epoch(pipeline, tmp_path, monkeypatch, overrides):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    # 16 pictures: on a CPU rollouts are filled up to a multiple of that.
    config = load_config("shapes", [f"pipeline={pipeline}", *SMALL, "group_size=8", *overrides])
    trainer = Trainer(config, tmp_path)
    # All but the transformer's products are left out of the measurement.
    embeds, pooled = trainer.policy.embed(["a red circle"])
    monkeypatch.setattr(
        trainer.policy, "embed", lambda prompts: (embeds.expand(len(prompts), -1, -1), pooled.expand(len(prompts), -1))
    )
    monkeypatch.setattr(trainer.policy, "decode", lambda x: torch.randint(0, 256, (len(x), 8, 8, 3), dtype=torch.uint8))
    evaluations, velocity = [], trainer.policy.velocity
    monkeypatch.setattr(
        trainer.policy, "velocity", lambda x, *rest: (evaluations.append(len(x)), velocity(x, *rest))[1]
    )
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as rollout:
        data = trainer.sample()
    drawn = sum(evaluations)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as training:
        trainer.optimize(data)
    costs = plan(config, epoch=0)
    assert costs.rollout_evaluations == drawn
    assert costs.training_evaluations == sum(evaluations) - drawn
    assert costs.rollout_flops == pytest.approx(rollout.get_total_flops(), rel=0.01)
    assert costs.training_flops == pytest.approx(training.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("overrides", [[], ["gradient_checkpointing=true"], ["kl_weight=0.1"], ["dtype=bfloat16"]])
def test_activations_are_what_a_backward_holds(pipeline, tmp_path, monkeypatch, overrides):
    monkeypatch.setattr("nft.plan._decoding", lambda *_: 0)
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    config = load_config("shapes", [f"pipeline={pipeline}", *SMALL, "group_size=24", "micro_batch=48", *overrides])
    trainer = Trainer(config, tmp_path)
    data = trainer.sample()
    pairs = [(i, trainer.grid[1].item(), i) for i in range(48)]
    held, _ = peak_and_launches(lambda: trainer._accumulate(data, pairs), trainer.policy.device)
    costs = plan(config)
    assert costs.memory["activations"] + 4 * costs.trained_parameters == pytest.approx(1e6 * held, rel=0.15)


def test_activations_are_what_the_vae_holds_where_that_is_more(pipeline):
    config = load_config("shapes", [f"pipeline={pipeline}", "dtype=bfloat16", "micro_batch=1", "rollout_batch=1"])
    policy = Policy(config)
    latents = torch.zeros(16, *policy.latent_shape)
    with torch.no_grad():
        held, _ = peak_and_launches(lambda: policy.model.decode(latents), policy.device)
    assert plan(config).memory["activations"] == pytest.approx(1e6 * held, rel=0.01)


def test_sd35_medium_has_its_published_size_and_fits_an_80_gb_gpu():
    costs = plan(load_config("sd35_geneval"), 8)
    # 2.5 billion with the table of positions (model page); the eight projections of 24 blocks at rank 32, 13 of which
    # have a second attention that is not adapted, and the last of which adds nothing to the text: 1536 x 32 x 2 each.
    assert 2.2e9 < costs.parameters < 2.5e9
    assert costs.trained_parameters == (24 * 8 - 1) * 2 * 1536 * 32
    assert costs.rollout_evaluations == 48 * 24 * 10
    assert sum(costs.memory.values()) < 80e9


def test_time_and_memory_follow_from_the_settings(pipeline, monkeypatch):
    monkeypatch.setattr("nft.plan._decoding", lambda *_: 0)
    config = load_config("shapes", [f"pipeline={pipeline}", *SMALL, "rollout_batch=1"])
    one, two = plan(config, 1, tflops=1), plan(config, 2, tflops=1)
    assert one.seconds == pytest.approx((one.rollout_flops + one.training_flops) / 1e12)
    assert one.seconds / 2 < two.seconds < 1.05 * one.seconds / 2
    smaller = plan(config.model_copy(update={"micro_batch": 1}))
    assert one.memory["activations"] == pytest.approx(5 * smaller.memory["activations"], rel=0.02)
    larger = plan(config.model_copy(update={"micro_batch": 1, "rollout_batch": 500}))
    assert larger.memory["activations"] > 10 * one.memory["activations"]


def test_what_cuda_graphs_keep_is_added(pipeline, monkeypatch):
    """A rollout, a backward, and an evaluation each of the old and of the reference policy; the VAE has no room in
    theirs."""
    monkeypatch.setattr("nft.plan._decoding", lambda *_: 0)

    def activations(*overrides):
        settings = [f"pipeline={pipeline}", "device=cuda", "micro_batch=8", *overrides]
        return plan(load_config("shapes", settings)).memory["activations"]

    step, graphs = activations("rollout_batch=1"), activations("rollout_batch=1", "cuda_graphs=true")
    rollout = activations("rollout_batch=4000")
    assert activations("rollout_batch=4000", "cuda_graphs=true") == pytest.approx(rollout + graphs, rel=0.01)
    old, both = graphs - step, activations("rollout_batch=1", "cuda_graphs=true", "kl_weight=0.1") - step
    assert 0 < old < step and both == pytest.approx(2 * old, rel=0.2)
    monkeypatch.setattr("nft.plan._decoding", lambda *_: 10**9)
    assert activations("rollout_batch=1") == 10**9
    assert activations("rollout_batch=1", "cuda_graphs=true") == graphs + 10**9


def test_what_is_sharded_is_divided_and_what_is_put_together_is_added(pipeline):
    def memory(gpus, *overrides):
        return plan(load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides]), gpus).memory

    transformer = SD3Transformer2DModel.from_pretrained(pipeline, subfolder="transformer")
    parameters = sum(p.numel() for p in transformer.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in transformer.transformer_blocks]
    for adapter in ("lora", "full"):
        alone, shared = memory(1, f"adapter={adapter}", "shard=true"), memory(4, f"adapter={adapter}", "shard=true")
        assert alone == memory(4, f"adapter={adapter}")
        assert alone["transformer"] - shared["transformer"] == pytest.approx(4 * parameters * 3 / 4, abs=4)
        assert shared["weights put together"] == 4 * (parameters - sum(blocks) + 2 * max(blocks))
        trained = "trained weights and optimizer"
        assert shared[trained] == pytest.approx(alone[trained] / (1 if adapter == "lora" else 4), abs=4)
        assert shared["merged weights"] == 0
    # 16 pairs in 3 updates: two for a GPU, which is one micro-batch of 5.
    assert "gradients put together" not in shared
    assert memory(4, "adapter=full", "shard=true", "micro_batch=1")["gradients put together"] == 4 * parameters


def test_every_stage_is_planned_at_its_own_cost(pipeline):
    stages = "stages=[{epochs: 1}, {epochs: 4, rollout_steps: 6}, {epochs: 2, timesteps_per_sample: 1}]"
    settings = [f"pipeline={pipeline}", *SMALL]
    costs = plan_stages(load_config("shapes", [*settings, stages]))
    assert [each.rollout_evaluations for each in costs] == [8 * 3, 8 * 6, 8 * 3]
    # In the run's first epoch the old policy is a copy and is not evaluated in the first of three updates.
    assert [each.training_evaluations for each in costs] == [16 + 16 - 4, 16 + 16, 8 + 8]
    alone = plan(load_config("shapes", [*settings, "rollout_steps=6"]))
    assert costs[1].seconds == alone.seconds


@pytest.mark.parametrize("whole", [True, False])
def test_a_pipeline_in_the_hubs_cache_is_one_on_disk(pipeline, tmp_path, whole):
    """Of one that is not there as a whole the weights are not known, and not counted as nothing."""
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(
        pipeline, cached / "snapshots" / "0123", ignore=None if whole else shutil.ignore_patterns("*.safetensors")
    )
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "nft.cli", "plan", "pipeline=someone/tiny"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("memory: text encoders and VAE" in found) == whole
    assert ("without text encoders and VAE, which are not on disk, and reward models" in found) != whole


def test_of_a_folder_only_what_is_loaded_is_counted_and_as_wide_as_it_is_loaded(tmp_path):
    whole = build_pipeline()
    parts = [whole.text_encoder, whole.text_encoder_2, whole.text_encoder_3, whole.vae]
    elements = sum(parameter.numel() for part in parts for parameter in part.parameters())
    whole.save_pretrained(tmp_path)
    whole.save_pretrained(tmp_path, variant="fp16")
    for name in ("sd3_medium.safetensors", "old/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file({"weight": torch.zeros(1000)}, tmp_path / name)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        memory = plan(load_config("shapes", [f"pipeline={tmp_path}", f"dtype={dtype}"])).memory
        assert memory["text encoders and VAE"] == elements * size
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"pipeline: .*vae/diffusion_pytorch_model.safetensors is damaged"):
        plan(load_config("shapes", [f"pipeline={tmp_path}"]))


def test_bad_plans_are_named(pipeline):
    with pytest.raises(ConfigError, match="pipeline: the settings of '/nowhere'"):
        plan(load_config("shapes", ["pipeline=/nowhere"]))
    with pytest.raises(ValueError, match="got 0"):
        plan(load_config("shapes", [f"pipeline={pipeline}"]), 0)


def test_what_a_plan_counts_besides():
    def costs(*overrides):
        return plan(load_config("shapes", [*SMALL, *overrides]))

    plain = costs()
    # Of 2 prompts in each of 3 epochs, and no more than are kept.
    embeddings = sum(x.nbytes for x in Policy(load_config("shapes")).embed(["a red circle"]))
    assert costs("epochs=3").memory["embeddings of prompts"] == 6 * embeddings > 0
    assert costs("epochs=1000000").memory["embeddings of prompts"] == 2**30
    # Trained, old, averaged and put-aside weights, a gradient and two moments, all in float32.
    assert plain.memory["trained weights and optimizer"] == 7 * 4 * plain.trained_parameters
    assert plain.memory["text encoders and VAE"] > 0 == costs("offload=true").memory["text encoders and VAE"]
    # Where they are larger than the activations, which they wait for, the device has to hold them all the same.
    large, offloaded = (plan(load_config("sd35_geneval", [f"offload={x}"])).memory for x in ("false", "true"))
    others, activations = (large[name] for name in ("text encoders and VAE", "activations"))
    assert others == 2 * 5_665_000_000 and sum(large.values()) - sum(offloaded.values()) == activations < others
    # 8 pictures of 4 x 16 x 16 latents; or more candidates, or the states around every step that draws noise.
    latents = 4 * 4 * 16 * 16
    assert plain.memory["latents of an epoch"] == 8 * latents
    assert costs("explore=12").memory["latents of an epoch"] == 2 * 12 * latents
    noisy = costs("objective=grpo", "rollout_solver=flow-sde")
    assert noisy.memory["latents of an epoch"] == 8 * (1 + 3 + 1) * latents
    # Heun takes two evaluations a step, and one for the last.
    heun = costs("eval_solver=heun", "eval_steps=10", "eval_prompts_per_group=5")
    assert heun.held_out_evaluations == 5 * 19
