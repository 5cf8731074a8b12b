"""The trainer on a GPU: the bundled world through the code paths of Stable Diffusion 3.5."""

import json

import pytest
import torch
from distributed_worker import Brightness, train_until

pytest.importorskip("diffusers")

from nft.config import load_config
from nft.policy import Policy
from nft.rollout import rollout
from nft.tasks import TASKS
from nft.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

PROMPTS = ["a red circle left of a blue square", "two green triangles"]
SMALL = ["prompts_per_epoch=2", "group_size=3", "rollout_steps=3", "timesteps_per_sample=2", "micro_batch=5",
         "eval_prompts_per_group=1", "eval_steps=2", "eval_every=2", "lora_rank=4"]  # fmt: skip


def settings(pipeline, *overrides):
    return load_config("shapes", [f"pipeline={pipeline}", "device=cuda", *SMALL, *overrides])


@torch.no_grad()
def disturb(parameters, generator):
    for parameter in parameters:
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).cuda())


def draw(pipeline, *overrides, batch=4):
    torch.manual_seed(0)
    policy = Policy(settings(pipeline, *overrides))
    generator = torch.Generator().manual_seed(1)
    disturb(policy._old, generator)
    seeds = list(range(6))
    with policy.merged("old"):
        return rollout(policy, [*PROMPTS, *PROMPTS, *PROMPTS], seeds, policy.times(4), "dpm++2M", batch)


FUSED = ["dtype=bfloat16", "fused_transformer=true"]


@pytest.mark.parametrize(
    "options",
    [[], ["dtype=bfloat16"], FUSED, [*FUSED, "cuda_graphs=true"]],
    ids=["float32", "bf16", "fused", "graphs"],
)
def test_epochs_train_and_resume(pipeline, tmp_path, monkeypatch, options):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    train_until(Trainer(settings(pipeline, "epochs=2", *options), tmp_path), 1)
    trainer = Trainer(settings(pipeline, "epochs=2", *options), tmp_path, resume=True)
    before = [p.detach().clone() for p in trainer.policy.trained]
    assert trainer.epoch == 1 and all(p.is_cuda for p in before)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.policy.trained)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.policy.trained, strict=True))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] == 2 and "eval_strict" in lines[-1]


@pytest.mark.parametrize(
    "options",
    [[], ["objective=grpo", "rollout_solver=flow-sde", "explore=6"], ["adapter=full", "lora_rank=32", "offload=true"]],
    ids=["nft", "grpo", "full"],
)
def test_the_bundled_world_trains(tmp_path, options):
    trainer = Trainer(load_config("shapes", ["device=cuda", "epochs=1", *SMALL, *options]), tmp_path)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["grad_norm"] >= 0 and 0 <= lines[-1]["eval_strict"] <= 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_rollouts_draw_what_eager_ones_do(pipeline, mode):
    expected = draw(pipeline)
    got = draw(pipeline, f"compile_rollout={mode}")
    assert (got - expected).norm() <= 1e-3 * expected.norm()


def test_fused_rollouts_are_as_accurate_as_plain_ones(pipeline):
    exact = draw(pipeline)
    plain, fused = draw(pipeline, "dtype=bfloat16"), draw(pipeline, *FUSED)
    assert (fused - exact).norm() <= 2 * (plain - exact).norm() <= 0.1 * exact.norm()


def test_graphs_draw_what_eager_evaluations_do(pipeline):
    pictures = []
    for extra in ([], ["cuda_graphs=true"]):
        torch.manual_seed(0)
        policy = Policy(settings(pipeline, *FUSED, *extra))
        generator = torch.Generator().manual_seed(1)
        for _ in range(2):
            disturb(policy._old, generator)
            with policy.merged("old"):
                grid = policy.times(4)
                pictures.append(rollout(policy, PROMPTS * 3, list(range(6)), grid, "dpm++2M", 4))
    first, second, replayed_first, replayed_second = pictures
    assert (first - second).norm() > 0.02 * first.norm()
    assert (replayed_first - first).norm() <= 1e-3 * first.norm()
    assert (replayed_second - second).norm() <= 1e-3 * second.norm()


def test_graphs_give_the_gradients_of_eager_evaluations(pipeline):
    """Of three micro-batches added up, of which the last is ragged, with steps of the optimizer between."""
    results = []
    for extra in ([], ["cuda_graphs=true"]):
        torch.manual_seed(0)
        policy = Policy(settings(pipeline, *FUSED, *extra))
        generator = torch.Generator().manual_seed(1)
        disturb(policy.trained, generator)
        optimizer, found = torch.optim.SGD(policy.trained, lr=0.1), []
        for count in (4, 4, 2, 4, 4, 2):
            x = torch.randn(count, *policy.latent_shape, generator=generator).cuda()
            t = torch.rand(count, generator=generator).cuda()
            conditions = policy.embed((PROMPTS * 2)[:count])
            with torch.no_grad():
                policy.use("old")
                old = policy.velocity(x, t, *conditions)
            policy.use("default")
            v = policy.velocity(x, t, *conditions)
            (v.float() - old.float()).square().mean().backward()
            # Its graph may not be alive when the next evaluation is recorded.
            v = v.detach()
            if count == 2:
                found += [v.flatten(), torch.cat([p.grad.flatten() for p in policy.trained])]
                optimizer.step()
                optimizer.zero_grad()
        results.append(found)
    for eager, replayed in zip(*results, strict=True):
        assert (eager - replayed).norm() <= 0.01 * eager.norm()


def test_a_backward_after_another_evaluation_is_refused(pipeline):
    policy = Policy(settings(pipeline, *FUSED, "cuda_graphs=true"))
    x, t, conditions = torch.randn(2, *policy.latent_shape).cuda(), torch.full((2,), 0.5).cuda(), policy.embed(PROMPTS)
    eager = policy.velocity(x, t, *conditions).detach()
    first, second = (policy.velocity(x, t, *conditions) for _ in range(2))
    assert torch.equal(first, second) and (first - eager).norm() <= 1e-3 * eager.norm()
    second.sum().backward()
    with pytest.raises(RuntimeError, match="backward: it is of an evaluation that was followed by another"):
        first.sum().backward()


def test_a_picture_does_not_depend_on_what_is_drawn_with_it(pipeline):
    """Batches of one size are the same shapes: the last one is filled up."""
    by_four, by_six = draw(pipeline, *FUSED, batch=4), draw(pipeline, *FUSED, batch=6)
    assert torch.equal(by_four, draw(pipeline, *FUSED, batch=4))
    assert (by_four - by_six).norm() <= 0.05 * by_six.norm()
