"""Two processes that share the transformer's weights train as one that has them all."""

import json
import shutil

import pytest
import torch

pytest.importorskip("diffusers")
if torch.__version__ < "2.9":
    pytest.skip("sharding needs torch 2.9", allow_module_level=True)

from distributed_worker import Brightness, by_fork
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nft import checkpoint
from nft.config import ConfigError, load_config
from nft.distributed import whole
from nft.tasks import TASKS
from nft.trainer import Trainer

pytestmark = pytest.mark.forks

# Five pictures two at a time, and updates of two and three pairs one at a time: processes have unlike numbers of
# batches in rollouts and in updates, and in the one of a single held-out prompt one has none.
SETTINGS = ["prompts_per_epoch=1", "group_size=5", "rollout_steps=2", "timesteps_per_sample=1", "micro_batch=1",
            "rollout_batch=2", "updates_per_epoch=2", "eval_prompts_per_group=1", "eval_steps=1", "eval_every=2",
            "eval_solver=euler", "epochs=2", "kl_weight=0.1", "learning_rate=1e-4",
            "fused_transformer=false"]  # fmt: skip
ADAPTERS = {"lora": "lora_rank=4", "full": "adapter=full"}


class Exchanges(TorchDispatchMode):
    """Counts the exchanges of sharded gradients."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def own(x):
    """What this process has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def run(folder, pipeline, adapter, *overrides, resume=False):
    """Train, and leave what each process held beside the run's folder."""
    torch.set_num_threads(1)
    config = load_config("shapes", [f"pipeline={pipeline}", ADAPTERS[adapter], *SETTINGS, *overrides])
    trainer = Trainer(config, folder, resume=resume)
    policy, optimize, exchanges = trainer.policy, trainer.optimize, []

    def counted(data):
        with Exchanges() as seen:
            metrics = optimize(data)
        exchanges.append(seen.count)
        return metrics

    trainer.optimize = counted
    trainer.train()
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    base = [p for name, p in policy.transformer.named_parameters() if "lora" not in name]
    groups = {"base": base, "trained": policy.trained, "old": policy._old, "ema": trainer.ema.shadow_params}
    groups |= {"moments": moments, "reference": getattr(policy, "_weights", {None: base})[None]}
    held = {name: sum(own(x).numel() for x in group) / sum(x.numel() for x in group) for name, group in groups.items()}
    values = {name: [whole(x.detach()) for x in group] for name, group in groups.items()}
    out = {"held": held, "exchanges": exchanges, "values": values, "epoch": trainer.epoch}
    torch.save(out, folder.parent / f"{folder.name}-{trainer.processes.rank}.pt")


def first_epoch(source, target):
    """A run as it was after its first epoch."""
    shutil.copytree(source, target, symlinks=True)
    shutil.rmtree(target / "checkpoints" / "epoch-000002")
    return target


@pytest.fixture(scope="module", params=["lora", "full"])
def runs(request, pipeline, tmp_path_factory):
    folder, adapter = tmp_path_factory.mktemp("runs"), request.param
    threads, shapes = torch.get_num_threads(), TASKS["shapes"]
    TASKS["shapes"] = Brightness
    try:
        run(folder / "one", pipeline, adapter)
        first_epoch(folder / "one", folder / "one_two")

        def work():
            run(folder / "two", pipeline, adapter, "shard=true")
            run(folder / "one_two", pipeline, adapter, "shard=true", resume=True)

        by_fork(2, work)
        run(first_epoch(folder / "two", folder / "two_one"), pipeline, adapter, resume=True)
    finally:
        torch.set_num_threads(threads)
        TASKS["shapes"] = shapes
    return adapter, folder, {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("name", ["two-0", "two-1", "one_two-0", "one_two-1", "two_one-0"])
def test_it_ends_with_the_weights_of_one_process(runs, name):
    _, _, found = runs
    assert found[name]["epoch"] == 2
    for group, values in found["one-0"]["values"].items():
        for ours, theirs in zip(found[name]["values"][group], values, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_logged_is_that_of_one_process(runs):
    _, folder, _ = runs
    one, *others = (
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two", "one_two", "two_one")
    )
    assert [line["epoch"] for line in one] == [0, 1, 2, 2]
    for lines in others:
        for ours, theirs in zip(lines, one, strict=True):
            for key in theirs.keys() & {"reward", "loss", "grad_norm", "kl", "velocity_rms", "eval_strict"}:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-7), key


def test_each_process_holds_half(runs):
    adapter, _, found = runs
    halves = {"base", "trained", "old", "ema", "moments", "reference"} if adapter == "full" else {"base", "reference"}
    for rank in (0, 1):
        for name, share in found[f"two-{rank}"]["held"].items():
            # A parameter with an odd number of rows is not halved exactly.
            assert share == pytest.approx(0.5, abs=0.01) if name in halves else share == 1, name
        for name in halves:
            assert found["two-0"]["held"][name] + found["two-1"]["held"][name] == pytest.approx(1)


def test_gradients_are_exchanged_once_for_each_optimizer_step(runs):
    adapter, _, found = runs
    # Each epoch has two updates; three blocks and what is outside of them. LoRA's gradients are in one all-reduce.
    assert found["two-0"]["exchanges"] == [2 * 4 if adapter == "full" else 0] * 2


def test_a_checkpoint_has_the_same_files_and_whole_tensors(runs):
    _, folder, _ = runs
    one, two = (folder / name / "checkpoints" / "epoch-000001" for name in ("one", "two"))
    names = sorted(path.relative_to(one) for path in one.rglob("*"))
    assert names == sorted(path.relative_to(two) for path in two.rglob("*"))
    assert checkpoint.verify(two)["epoch"] == 1
    for path in one.rglob("*config.json"):
        assert path.read_text() == (two / path.relative_to(one)).read_text()
    for path in one.rglob("*.safetensors"):
        ours, theirs = load_file(two / path.relative_to(one)), load_file(path)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.load(path / "state.pt", weights_only=True)["optimizer"]["state"] for path in (two, one))
    assert ours.keys() == theirs.keys()
    for i in theirs:
        assert {name: x.shape for name, x in ours[i].items()} == {name: x.shape for name, x in theirs[i].items()}


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_one_process_shards_nothing(pipeline, tmp_path, monkeypatch, adapter):
    monkeypatch.setitem(TASKS, "shapes", Brightness)
    config = load_config("shapes", [f"pipeline={pipeline}", ADAPTERS[adapter], *SETTINGS, "shard=true"])
    trainer = Trainer(config, tmp_path)
    assert not any(isinstance(p, DTensor) for p in trainer.policy.transformer.parameters())


@pytest.mark.parametrize("setting", ["fused_transformer=true", "compile_rollout=default"])
def test_what_replaces_the_transformer_is_refused(setting):
    with pytest.raises(ConfigError, match=f"^shard: got true with {setting.replace('true', 'True')}, it needs"):
        load_config("shapes", ["shard=true", setting])
