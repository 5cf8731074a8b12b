"""Checkpoints survive a kill at any moment, a full disk and a flipped bit, and load into diffusers."""

import gc
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from distributed_worker import Brightness, train_until
from tqdm import tqdm
from typer.testing import CliRunner

from nft import checkpoint, files
from nft.alarms import Alarms
from nft.checkpoint import CheckpointError
from nft.cli import app
from nft.config import load_config
from nft.tasks import TASKS
from nft.trainer import Trainer

pytestmark = pytest.mark.forks

SMALL = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=2", "timesteps_per_sample=1", "eval_prompts_per_group=1",
         "eval_steps=1", "eval_every=2", "lora_rank=4", "epochs=4", "eval_solver=euler"]  # fmt: skip


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", Brightness)


def settings(pipeline, *overrides):
    return load_config("shapes", [f"pipeline={pipeline}", *SMALL, *overrides])


def state(folder):
    """Everything that a checkpoint holds, as tensors and plain values by name."""
    values = torch.load(folder / "state.pt", weights_only=True)
    for path in folder.rglob("*.safetensors"):
        values[path.relative_to(folder).as_posix()] = path.read_bytes()
    return values


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def in_child(config, folder, *, dies_at=None, dies_after=None):
    """Train in a process that kills itself at its n-th look at the disk, or that is killed after a time."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        # Processes share the one of loading bars, which one that is killed while it holds it keeps for ever.
        tqdm.set_lock(threading.RLock())
        count = 0
        flush, rmtree, link = files.flush, checkpoint.shutil.rmtree, checkpoint.link

        def fatal(function):
            def wrapped(*args, **kwargs):
                nonlocal count
                count += 1
                if count == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        files.flush, checkpoint.shutil.rmtree, checkpoint.link = map(fatal, (flush, rmtree, link))
        try:
            Trainer(config, folder, resume=(folder / "config.yaml").exists()).train()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    if dies_after:
        timer = threading.Timer(dies_after, os.kill, (child, signal.SIGKILL))
        timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if dies_after:
        timer.cancel()
    return code


def test_a_run_that_is_killed_again_and_again_ends_as_an_unbroken_one(pipeline, tmp_path):
    config = settings(pipeline)
    begin = time.perf_counter()
    assert in_child(config, tmp_path / "whole") == 0
    whole = time.perf_counter() - begin
    # In the first checkpoint or at the second's start, then after a time, then wherever; at last it may finish.
    rng, killed = random.Random(0), 0
    deaths = [{"dies_at": rng.randint(2, 20)} for _ in range(3)]
    deaths += [{"dies_after": rng.uniform(0.3, 0.8) * whole} for _ in range(2)]
    deaths += [{"dies_at": rng.randint(2, 45)} for _ in range(3)]
    for death in [*deaths, {}]:
        code = in_child(config, tmp_path / "parts", **death)
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
        killed += 1
    assert code == 0 and killed >= 3
    for name in ("checkpoint", "best"):
        assert equal(state(tmp_path / "whole" / name), state(tmp_path / "parts" / name))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    assert sorted(os.listdir(tmp_path / "whole" / "checkpoints")) == sorted(
        os.listdir(tmp_path / "parts" / "checkpoints")
    )


def test_a_kill_before_the_last_link_is_made_good(pipeline, tmp_path, monkeypatch):
    link = checkpoint.link

    def killed(name, target):
        if name.name == "best" and target.name == "epoch-000004":
            raise KeyboardInterrupt
        link(name, target)

    monkeypatch.setattr(checkpoint, "link", killed)

    def evaluate(self):
        scores = {"eval_strict": self.epoch / 10, "eval_strict_std": 0.1, "nonfinite_scores": 0}
        return scores, torch.zeros(1), ["a"]

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        Trainer(settings(pipeline), tmp_path / "run").train()
    assert (tmp_path / "run" / "best").resolve().name == "epoch-000002"
    monkeypatch.setattr(checkpoint, "link", link)
    Trainer(settings(pipeline), tmp_path / "run", resume=True).train()
    assert (tmp_path / "run" / "best").resolve().name == "epoch-000004"


def test_what_a_kill_left_unfinished_is_gone_when_the_run_goes_on(pipeline, tmp_path):
    train_until(Trainer(settings(pipeline), tmp_path), 1)
    (kept,) = checkpoint.existing(tmp_path / "checkpoints")
    (mine := tmp_path / ".notes.tmp").touch()
    for path in (tmp_path / "config.yaml", tmp_path / "metrics.jsonl", kept / "manifest.json"):
        files.beside(path).touch()
    Trainer(settings(pipeline), tmp_path, resume=True).close()
    assert [*tmp_path.rglob(".*.tmp")] == [mine]


def test_a_run_that_was_copied_without_its_links_goes_on(pipeline, tmp_path):
    Trainer(settings(pipeline, "epochs=2"), tmp_path / "run").train()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert not (tmp_path / "copy" / "checkpoint").is_symlink()
    Trainer(settings(pipeline, "epochs=3"), tmp_path / "copy", resume=True).train()
    assert (tmp_path / "copy" / "checkpoint").resolve().name == "epoch-000003"


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline), tmp_path / "run")
    trainer.epoch = 1
    trainer.save()
    before = state(tmp_path / "run" / "checkpoint")
    trainer.optimize(trainer.sample())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond this, as on a disk that fills up.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"epoch-000002 could not be written.*earlier checkpoints are as"):
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch-000001"]
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "epoch-000001")
    assert equal(before, state(tmp_path / "run" / "checkpoint"))
    trainer.save()
    assert (tmp_path / "run" / "checkpoint").resolve().name == "epoch-000002"


@pytest.fixture
def written(tmp_path):
    """A checkpoint of one file."""
    folder = tmp_path / "checkpoints" / "epoch-000001"
    checkpoint.write(
        folder, lambda f: (f / "weights").write_bytes(bytes(1000)), {"epoch": 1, "score": None, "stage": 0}
    )
    return folder


def test_damage_is_named(written):
    assert checkpoint.verify(written)["epoch"] == 1
    for damage, message in (
        (lambda f: (f / "weights").write_bytes(bytes(999) + b"\1"), "weights has another checksum"),
        (lambda f: (f / "weights").unlink(), "weights is missing"),
        *(
            (lambda f, text=text: (f / "manifest.json").write_text(text), "no readable manifest.*delete")
            for text in (
                *("{", "[]", "{}", "1", '{"epoch": 1, "stage": 0, "score": "a", "sha256": {}}'),
                '{"epoch": 1, "stage": 0, "score": null, "sha256": {}, "surroundings": 1}',
            )
        ),
    ):
        damage(written)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.verify(written)


def test_a_manifest_that_says_something_else_is_damaged(written):
    checkpoint.amend(written, score=0.5)
    about = checkpoint.verify(written)
    assert (about["epoch"], about["score"]) == (1, 0.5)
    text = (written / "manifest.json").read_text()
    for before, after in (('"epoch": 1', '"epoch": 3'), ("0.5", "0.7")):
        (written / "manifest.json").write_text(text.replace(before, after))
        with pytest.raises(CheckpointError, match=r"manifest.json.*another checksum.*delete"):
            checkpoint.verify(written)


def test_a_damaged_checkpoint_is_not_resumed(pipeline, tmp_path):
    trainer = Trainer(settings(pipeline, "epochs=2"), tmp_path / "run")
    trainer.train()
    again = Trainer(settings(pipeline, "epochs=2"), tmp_path / "run", resume=True)
    assert again.alarms.state() == trainer.alarms.state() != Alarms({}).state()
    weights = tmp_path / "run" / "checkpoint" / "old" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"old/adapter_model\.safetensors has another checksum.*delete"):
        Trainer(settings(pipeline, "epochs=2"), tmp_path / "run", resume=True)


def test_an_older_damaged_checkpoint_is_in_nobodys_way(pipeline, tmp_path):
    train_until(Trainer(settings(pipeline, "epochs=3"), tmp_path / "run"), 2)
    first, newest = checkpoint.existing(tmp_path / "run" / "checkpoints")
    (first / "manifest.json").write_text("")
    resumed = Trainer(settings(pipeline, "epochs=3"), tmp_path / "run", resume=True)
    assert resumed.epoch == 2 and (tmp_path / "run" / "best").resolve() == newest
    resumed.train()


def test_a_refused_resume_changes_nothing(pipeline, tmp_path):
    train_until(Trainer(settings(pipeline, "epochs=3"), tmp_path / "run"), 2)
    # Nothing can be put in the place of such a file, as on a full disk.
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    (tmp_path / "run" / "metrics.jsonl" / "held").touch()
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        Trainer(settings(pipeline, "epochs=9"), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before


def test_the_newest_and_the_best_are_kept(tmp_path):
    parent = tmp_path / "checkpoints"
    for epoch, (score, stage) in enumerate([(0.9, 0), (None, 1), (0.2, 1), (0.6, 1), (0.6, 1), (0.1, 1), (0.3, 1)], 1):
        about = {"epoch": epoch, "score": score, "stage": stage}
        checkpoint.write(parent / f"epoch-{epoch:06d}", lambda f: (f / "weights").touch(), about)
        # Until another stage has a score, the best is that of the one before.
        assert checkpoint.prune(parent, 2).name == f"epoch-{[1, 1, 3, 4][min(epoch, 4) - 1]:06d}"
    # The score of another stage's task does not count, and of equals the first stays.
    assert [path.name for path in checkpoint.existing(parent)] == ["epoch-000004", "epoch-000006", "epoch-000007"]
    assert checkpoint.best(parent).name == "epoch-000004"
    assert sorted(p.name for p in parent.iterdir()) == ["epoch-000004", "epoch-000006", "epoch-000007"]


def test_the_newest_is_by_its_number_and_not_by_its_name(tmp_path):
    for epoch in (999_999, 1_000_000):
        about = {"epoch": epoch, "score": None, "stage": 0}
        checkpoint.write(tmp_path / f"epoch-{epoch:06d}", lambda f: (f / "weights").touch(), about)
    checkpoint.prune(tmp_path, 1)
    assert [path.name for path in checkpoint.existing(tmp_path)] == ["epoch-1000000"]


def test_checkpoints_of_every_so_many_epochs(pipeline, tmp_path):
    """Some are written, some are kept, and a run that is resumed from one ends as an unbroken one."""

    def make(name, *more, **how):
        return Trainer(settings(pipeline, "epochs=7", "eval_every=10", *more), tmp_path / name, **how)

    def kept(name):
        return [int(path.name[-6:]) for path in checkpoint.existing(tmp_path / name / "checkpoints")]

    every = ("save_every=2", "keep_checkpoints=1", "keep_every=4")
    train_until(make("run", *every), 5)
    assert kept("run") == [4]
    resumed = make("run", *every, resume=True)
    assert resumed.epoch == 4
    resumed.train()
    # The last epoch's is written for its evaluation.
    assert kept("run") == [4, 7]
    whole = make("whole", "keep_every=3", "keep_checkpoints=2")
    whole.train()
    assert kept("whole") == [3, 6, 7]
    assert all(map(torch.equal, whole.policy.trained, resumed.policy.trained))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, *range(1, 8), 7]


def test_a_score_that_is_no_number_is_not_the_best(tmp_path):
    for epoch, score in enumerate([float("nan"), 0.2, 0.1], 1):
        about = {"epoch": epoch, "score": score, "stage": 0}
        checkpoint.write(tmp_path / f"epoch-{epoch:06d}", lambda f: (f / "weights").touch(), about)
    assert checkpoint.best(tmp_path).name == "epoch-000002"


def test_a_copy_of_a_checkpoint_is_none_and_stays_and_one_without_its_manifest_is_damaged(tmp_path):
    for epoch in range(1, 5):
        folder = tmp_path / f"epoch-{epoch:06d}"
        checkpoint.write(folder, lambda f: (f / "weights").touch(), {"epoch": epoch, "score": None, "stage": 0})
        if epoch == 1:
            checkpoint.shutil.copytree(folder, tmp_path / "epoch-000001.bak")
        checkpoint.prune(tmp_path, 2)
    names = ["epoch-000003", "epoch-000004"]
    assert [path.name for path in checkpoint.existing(tmp_path)] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000001.bak", *names]
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"epoch-000004 has no readable manifest\.json.*delete"):
        checkpoint.manifest(checkpoint.existing(tmp_path)[-1])


def test_everything_is_on_the_disk_before_a_checkpoint_is_in_its_place(tmp_path, monkeypatch):
    done, fsync, rename = [], os.fsync, checkpoint.Path.rename

    def flushed(descriptor):
        done.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(path, target):
        done.append(("rename", path))
        return rename(path, target)

    def fill(folder):
        (folder / "old").mkdir()
        for name in ("state.pt", "old/weights"):
            (folder / name).write_text(name)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(checkpoint.Path, "rename", renamed)
    checkpoint.write(tmp_path / "epoch-000001", fill, {"epoch": 1, "score": None, "stage": 0})
    fresh = next(path for what, path in done if what == "rename")
    before = {path for _, path in done[: done.index(("rename", fresh))]}
    assert {fresh / name for name in (".", "old", "old/weights", "state.pt", "manifest.json")} <= before
    assert done[-1] == ("flush", tmp_path)


def test_a_checkpoint_that_is_written_again_takes_the_place_of_the_first(tmp_path):
    for text in ("first", "second"):
        about = {"epoch": 1, "score": None, "stage": 0}
        checkpoint.write(tmp_path / "epoch-000001", lambda f, text=text: (f / "weights").write_text(text), about)
    assert (tmp_path / "epoch-000001" / "weights").read_text() == "second"
    checkpoint.verify(tmp_path / "epoch-000001")


def test_a_link_is_there_at_any_moment(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    checkpoint.link(tmp_path / "best", tmp_path / "a")
    symlink = checkpoint.Path.symlink_to

    def watched(path, *args, **options):
        assert (tmp_path / "best").resolve() == tmp_path / "a"
        symlink(path, *args, **options)

    monkeypatch.setattr(checkpoint.Path, "symlink_to", watched)
    checkpoint.link(tmp_path / "best", tmp_path / "b")
    assert (tmp_path / "best").resolve() == tmp_path / "b"


def test_the_end_of_a_large_file_is_looked_at_too(tmp_path):
    def fill(folder):
        (folder / "weights").write_bytes(bytes(3 << 20))

    folder = tmp_path / "epoch-000001"
    checkpoint.write(folder, fill, {"epoch": 1, "score": None, "stage": 0})
    checkpoint.verify(folder)
    (folder / "weights").write_bytes(bytes((3 << 20) - 1) + b"x")
    with pytest.raises(CheckpointError, match="weights has another checksum"):
        checkpoint.verify(folder)


def test_a_state_that_lacks_its_optimizer_is_named(pipeline, tmp_path):
    Trainer(settings(pipeline, "epochs=1", "preflight=false"), tmp_path).train()
    state = (folder := (tmp_path / "checkpoint").resolve()) / "state.pt"
    torch.save({"epoch": 1}, state)
    sums = checkpoint.manifest(folder)["sha256"] | {"state.pt": files.checksum(state)}
    checkpoint.amend(folder, sha256=sums)
    with pytest.raises(ValueError, match=r"checkpoint: .*state\.pt is damaged: KeyError\('optimizer'\)"):
        Trainer(settings(pipeline, "epochs=2"), tmp_path, resume=True)


def test_a_damaged_checkpoint_is_found_before_the_pipeline_is_loaded(pipeline, tmp_path, monkeypatch):
    Trainer(settings(pipeline, "epochs=1", "preflight=false"), tmp_path).train()
    (tmp_path / "checkpoint" / "state.pt").write_bytes(b"x")
    monkeypatch.setattr("nft.trainer.Policy", None)
    with pytest.raises(CheckpointError, match=r"state\.pt has another checksum"):
        Trainer(settings(pipeline, "epochs=2"), tmp_path, resume=True)


def test_what_is_half_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    for epoch in range(1, 4):
        about = {"epoch": epoch, "score": None, "stage": 0}
        checkpoint.write(tmp_path / f"epoch-{epoch:06d}", lambda f: (f / "weights").touch(), about)

    def interrupted(path, **_):
        (path / "weights").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.existing(tmp_path)] == ["epoch-000002", "epoch-000003"]


def test_a_file_that_cannot_be_written_is_named_and_stays_as_it_was(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    files.replace_text(tmp_path / "a", "old")
    monkeypatch.setattr(files, "flush", full)
    with pytest.raises(OSError, match=r"a could not be written: No space left"):
        files.replace_text(tmp_path / "a", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    # And on a disk where not even what is not there can be deleted.
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: full(None))
    with pytest.raises(OSError, match=r"a could not be written: No space left"):
        files.replace_text(tmp_path / "a", "new")


def test_a_folder_within_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name, message in (("file", "file is a file"), ("file/a/b", "which is a file")):
        with pytest.raises(FileExistsError, match=f"^output: .*{message}"):
            files.check_folder(tmp_path / name)
    files.check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def finished(pipeline, tmp_path_factory):
    """A run of one epoch and its pipeline, and beside it what full fine-tuning leaves."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(TASKS, "shapes", Brightness)
        Trainer(settings(pipeline, "epochs=1", "preflight=false"), folder / "run").train()
        full = ["adapter=full", "lora_rank=32"]
        Trainer(settings(pipeline, "epochs=1", "preflight=false", *full), folder / "full").train()
    return folder


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def says(text):
    return lambda path: path.write_text(text)


RESUME, REPORT, EXPORT = (
    ["train", "--output", "run", "--resume", "epochs=2"],
    ["report", "run"],
    ["export", "run", "out"],
)
SAMPLE = ["sample", "a red circle", "--checkpoint", "run", "--override"]
EVAL = ["eval", "--limit", "1", "--checkpoint", "run", "--output", "out", "--override"]
# Of weights alone, beside which nothing says what they were.
LORA, FULL = ([*SAMPLE[:3], name, "--override"] for name in ("lora", "whole"))
WEIGHTS, EMA = (f"checkpoint/{name}/adapter_model.safetensors" for name in ("default", "ema"))
WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "command", "message"),
    [
        *(("run/metrics.jsonl", says("no\n{}\n"), c, "metrics.jsonl, line 1: got 'no") for c in (RESUME, REPORT)),
        ("run/metrics.jsonl", says("[]\n"), REPORT, "metrics.jsonl, line 1: got '[]"),
        ("run/metrics.jsonl", says('{"epoch": 1, "step": 1, "eval_strict": null}\n'), REPORT, "line 1: got"),
        ("run/metrics.jsonl", says('{"epoch": 1}\n'), REPORT, 'line 1: got \'{"epoch": 1}'),
        ("run/metrics.jsonl", lambda path: path.write_bytes(bytes([255, 10])), REPORT, "metrics.jsonl, line 1: got"),
        ("run/metrics.jsonl", os.unlink, [*REPORT, "full"], "run holds no metrics.jsonl with an epoch in it"),
        *(
            ("run/config.yaml", says("epochs: ["), c, "run/config.yaml: is not YAML")
            for c in (RESUME, REPORT, [*REPORT, "full"], [*EXPORT, "--merge"])
        ),
        ("run/config.yaml", says("epochs: many"), [*RESUME[:-1]], "got 'many', input should be a valid integer (with"),
        ("run/config.yaml", says("- a"), REPORT, "run/config.yaml holds list"),
        ("run/config.yaml", says("pipeline: [a]"), [*EXPORT, "--merge"], "run is no part of a run that says"),
        ("run/config.yaml", os.unlink, RESUME, "run holds no config.yaml"),
        ("run/config.yaml", os.unlink, REPORT, "run/config.yaml cannot be read"),
        ("run/checkpoint/manifest.json", says("[]"), RESUME, "epoch-000001 has no readable manifest.json"),
        ("run/checkpoint/state.pt", os.unlink, RESUME, "epoch-000001/state.pt is missing"),
        (f"run/{WEIGHTS}", cut, RESUME, "adapter_model.safetensors has another checksum"),
        *((f"run/{EMA}", cut, c, "ema/adapter_model.safetensors has another checksum") for c in (SAMPLE, EVAL, EXPORT)),
        (f"run/{WEIGHTS}", cut, [*EXPORT, "--weights", "default"], "default/adapter_model.safetensors has another"),
        ("run/checkpoint/ema/adapter_config.json", os.unlink, SAMPLE, "ema/adapter_config.json is missing"),
        ("run/checkpoint", os.unlink, SAMPLE, "checkpoint: got 'run'"),
        ("lora/adapter_model.safetensors", cut, LORA, "lora/adapter_model.safetensors is damaged: SafetensorError"),
        ("lora/adapter_config.json", cut, LORA, "lora/adapter_config.json is damaged: JSONDecodeError"),
        ("lora/adapter_config.json", says('{"r": "4", "lora_alpha": 4}'), LORA, "adapter_config.json is damaged: Type"),
        ("lora/adapter_config.json", says("{}"), ["export", "lora", "out"], "adapter_config.json is damaged: KeyError"),
        ("lora/adapter_config.json", os.unlink, LORA, "lora/adapter_config.json"),
        (f"full/checkpoint/ema/{WHOLE}", cut, ["export", "full", "out", "--merge"], f"{WHOLE} has another checksum"),
        (f"whole/{WHOLE}", cut, FULL, f"whole/{WHOLE} is damaged: SafetensorError"),
        (f"whole/{WHOLE}", cut, ["export", "whole", "out", "--merge", "--pipeline", "PIPELINE"], f"whole/{WHOLE}"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_in_one_line(
    finished, pipeline, tmp_path, monkeypatch, file, damage, command, message
):
    monkeypatch.chdir(tmp_path)
    for run, weights in (("run", "lora"), ("full", "whole")):
        shutil.copytree(finished / run, run, symlinks=True)
        shutil.copytree(f"{run}/checkpoint/ema", weights)
    damage(tmp_path / file)
    command = [pipeline if word == "PIPELINE" else word for word in command]
    result = CliRunner().invoke(app, [*command, f"pipeline={pipeline}"] if command[-1] == "--override" else command)
    assert result.exit_code == 2 and message in result.output, (result.output, result.exception)
    assert len(result.output.splitlines()) == 1


def test_files_that_may_be_many_gigabytes_are_read_for_their_checksums_once(finished, pipeline, tmp_path, monkeypatch):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    read, checksum = [], files.checksum
    monkeypatch.setattr(files, "checksum", lambda path: read.append(path.name) or checksum(path))
    Trainer(settings(pipeline, "epochs=2"), tmp_path / "run", resume=True).close()
    assert read.count("state.pt") == 1


def test_a_folder_that_has_lost_its_log_is_no_place_for_another_run(finished, pipeline, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run", symlinks=True)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(FileExistsError, match="holds a run already"):
        Trainer(settings(pipeline), tmp_path / "run")
    assert Trainer(settings(pipeline), tmp_path / "run", resume=True).epoch == 1


def test_a_locked_folder_is_closed_to_other_processes_until_it_is_unlocked(tmp_path):
    code = "import sys; from pathlib import Path; from nft.files import lock; lock(Path(sys.argv[1]))"

    def other():
        return subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)

    # Of the process, which may begin a run anew, and lose what held the first one.
    for _ in range(2):
        files.lock(tmp_path / "run")
        gc.collect()
    assert "another process trains in" in other().stderr
    files.unlock(tmp_path / "run")
    assert other().returncode == 0


def test_a_folder_that_was_deleted_is_locked_anew(tmp_path):
    for _ in range(2):
        files.lock(tmp_path / "run")
        assert (tmp_path / "run" / ".lock").is_file()
        shutil.rmtree(tmp_path / "run")
    files.unlock(tmp_path / "run")
