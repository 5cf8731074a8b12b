"""Full fine-tuning: the same trainer on a policy whose every weight is trained."""

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import StableDiffusion3Pipeline
from distributed_worker import Brightness

from nft.config import load_config
from nft.export import export_lora, export_pipeline
from nft.full import FullPolicy, load_policy
from nft.tasks import TASKS
from nft.trainer import Trainer

SMALL = ["adapter=full", "prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1",
         "eval_prompts_per_group=1", "eval_steps=1", "eval_solver=euler", "epochs=2", "updates_per_epoch=2",
         "learning_rate=1e-3"]  # fmt: skip


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)


def settings(pipeline, *overrides):
    return load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides])


def velocity(policy, adapter):
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    policy.use(adapter)
    with torch.no_grad():
        return policy.velocity(x, torch.tensor([0.3, 0.8]), *policy.embed(["a red circle", "two blue squares"]))


def test_the_three_policies_are_one_at_first_and_then_follow_their_rules(pipeline, tmp_path):
    policy = FullPolicy(settings(pipeline))
    base = [weight.clone() for weight in policy._weights[None]]
    assert torch.equal(velocity(policy, "old"), velocity(policy, None))
    policy.use("default")
    assert all(parameter.requires_grad for parameter in policy.trained)
    with torch.no_grad():
        for parameter in policy.trained:
            parameter.add_(0.01)
    assert not torch.equal(velocity(policy, "default"), velocity(policy, "old"))
    assert torch.equal(velocity(policy, "old"), velocity(policy, None))
    policy.use("default")
    policy.save_adapter("old", tmp_path)
    assert all(p.data_ptr() == w.data_ptr() for p, w in zip(policy.trained, policy._weights["default"], strict=True))
    policy.update_old(0.25)
    for old, start, new in zip(policy._old, base, policy.trained, strict=True):
        torch.testing.assert_close(old, 0.25 * start + 0.75 * new.detach())
    assert all(map(torch.equal, base, policy._weights[None]))
    with pytest.raises(KeyboardInterrupt), policy.merged("old"):
        raise KeyboardInterrupt
    assert all(p.data_ptr() == w.data_ptr() for p, w in zip(policy.trained, policy._weights["default"], strict=True))


def test_what_only_draws_holds_no_more_copies_than_it_draws_with(pipeline, tmp_path):
    whole = FullPolicy(settings(pipeline))
    with torch.no_grad():
        for parameter in whole.trained:
            parameter.add_(0.01)
    expected = {name: velocity(whole, name) for name in ("default", None)}
    whole.save_adapter("default", tmp_path)
    for reference, names in ((False, ["default"]), (True, ["default", None])):
        policy = load_policy(settings(pipeline), tmp_path, reference=reference)
        assert list(policy._weights) == names
        assert all(torch.equal(velocity(policy, name), expected[name]) for name in names)


@pytest.mark.parametrize(
    "overrides", [["kl_weight=0.1"], ["dtype=bfloat16", "gradient_checkpointing=true"], ["explore=3"]]
)
def test_a_resumed_run_ends_as_an_unbroken_one(pipeline, tmp_path, overrides):
    whole = Trainer(settings(pipeline, *overrides), tmp_path / "whole")
    start = [weight.clone() for weight in whole.policy._weights[None]]
    whole.train()
    Trainer(settings(pipeline, *overrides, "epochs=1"), tmp_path / "parts").train()
    second = Trainer(settings(pipeline, *overrides), tmp_path / "parts", resume=True)
    assert second.epoch == 1
    second.train()
    for name in ("default", "old"):
        assert all(map(torch.equal, whole.policy._weights[name], second.policy._weights[name]))
    assert all(map(torch.equal, whole.ema.shadow_params, second.ema.shadow_params))
    # Weights of every kind have moved, biases and norms too; the reference has not.
    moved = [not torch.equal(a, b) for a, b in zip(start, whole.policy._weights["default"], strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert all(map(torch.equal, start, whole.policy._weights[None]))
    assert {weight.dtype for weight in whole.policy.trained} == {torch.float32}
    export_pipeline(tmp_path / "whole", tmp_path / "exported", pipeline, weights="default")
    exported = StableDiffusion3Pipeline.from_pretrained(tmp_path / "exported").transformer
    whole.policy.use("default")
    assert all(map(torch.equal, exported.parameters(), whole.policy.trained))
    with pytest.raises(ValueError, match="holds whole weights; export them with --merge"):
        export_lora(tmp_path / "whole", tmp_path / "lora")
