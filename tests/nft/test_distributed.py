"""One, two and three processes on the CPU train the same."""

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

import distributed_worker
from distributed_worker import LOCAL, SETTINGS, Chance, by_fork, train_until

from nft.checkpoint import CheckpointError
from nft.config import load_config
from nft.distributed import Processes
from nft.tasks import TASKS
from nft.trainer import Trainer
from nft.worlds.shapes.tiny import build_pipeline

pytestmark = pytest.mark.forks


TORCHRUN, ACCELERATE = ("-m", "torch.distributed.run"), ("-m", "accelerate.commands.launch")


def launched(*launches, folder, pipeline):
    """Commands of one launcher, a node each, side by side."""
    environment = {**os.environ, **LOCAL, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    work = distributed_worker.__file__, folder, pipeline
    running = [
        subprocess.Popen([sys.executable, *launch, *work], env=environment, stderr=subprocess.PIPE, text=True)
        for launch in launches
    ]
    try:
        for each in running:
            said = each.communicate(timeout=300)[1]
            assert each.returncode == 0, said[-3000:]
    finally:
        for each in running:
            each.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pipeline = str(folder / "pipeline")
    build_pipeline().save_pretrained(pipeline)
    threads, shapes = torch.get_num_threads(), TASKS["shapes"]
    try:
        distributed_worker.run(folder / "run1", pipeline)
        by_fork(2, lambda: distributed_worker.run(folder / "run2", pipeline))
    finally:
        torch.set_num_threads(threads)
        TASKS["shapes"] = shapes
    launched((*TORCHRUN, "--standalone", "--nproc-per-node=3"), folder=folder / "run3", pipeline=pipeline)
    return folder, {
        count: [torch.load(folder / f"run{count}-{rank}.pt") for rank in range(count)] for count in (1, 2, 3)
    }


@pytest.mark.parametrize("count", [2, 3])
def test_the_same_pictures_advantages_and_weights_as_one_process(runs, count):
    _, found = runs
    (one,), many = found[1], found[count]
    assert [out["processes"] for out in many] == [count] * count
    for out in many:
        # The first epoch's pictures come from equal weights: all that differs is the batch that they were drawn in.
        torch.testing.assert_close(out["x0"][0], one["x0"][0], rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(out["r"], one["r"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        for name in ("trained", "old", "ema"):
            for ours, theirs in zip(out[name], one[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("launcher", ["torchrun on two nodes", "accelerate launch"])
def test_other_launchers_make_the_same_processes(runs, launcher):
    """To the last bit of what two processes got that were started in another way."""
    folder, found = runs
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    name = launcher.partition(" ")[0]
    if name == "torchrun":
        both = (*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}")
        launches = [(*both, f"--node-rank={rank}") for rank in range(2)]
    else:
        # Its name for several processes; without a GPU they are on the CPU.
        settings = "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"
        launches = [(*ACCELERATE, "--multi_gpu", "--num_processes=2", *settings)]
    launched(*launches, folder=folder / name, pipeline=folder / "pipeline")
    for rank, wanted in enumerate(found[2]):
        got = torch.load(folder / f"{name}-{rank}.pt")
        assert got["processes"] == 2
        for key in ("r", "x0", "trained", "old", "ema"):
            assert all(map(torch.equal, got[key], wanted[key]))


@pytest.mark.parametrize("count", [2, 3])
def test_all_processes_hold_the_same_bits(runs, count):
    first, *others = runs[1][count]
    for other in others:
        for name in ("r", "x0", "trained", "old", "ema"):
            assert all(map(torch.equal, first[name], other[name]))


def test_one_process_writes(runs):
    folder, found = runs
    logs = {}
    for count in found:
        lines = (folder / f"run{count}" / "metrics.jsonl").read_text().splitlines()
        logs[count] = [json.loads(line) for line in lines]
        assert [line["epoch"] for line in logs[count]] == [0, 1, 2, 2]
    for count in (2, 3):
        for one, many in zip(logs[1], logs[count], strict=True):
            assert one.keys() == many.keys()
            for key in one.keys() & {"reward", "loss", "grad_norm", "kl", "velocity_rms", "eval_strict"}:
                assert one[key] == pytest.approx(many[key], rel=1e-3, abs=1e-7), key


def test_processes_that_see_other_checkpoints_do_not_go_on(runs, tmp_path):
    """As on two machines, one of which is shown late what was written last."""
    folder, _ = runs
    for name in ("0", "1"):
        shutil.copytree(folder / "run2", tmp_path / name, symlinks=True)
    shutil.rmtree(tmp_path / "1" / "checkpoints")

    def work():
        own = tmp_path / os.environ["RANK"]
        with pytest.raises(CheckpointError, match=r"resume: the processes found .* after epochs 2, 0, accepted"):
            Trainer(load_config(str(own / "config.yaml")), own, resume=True)

    before = (tmp_path / "1" / "metrics.jsonl").read_text()
    by_fork(2, work)
    assert (tmp_path / "1" / "metrics.jsonl").read_text() == before


def test_a_process_may_have_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "shapes", TASKS["shapes"])
    pipeline, more = str(tmp_path / "pipeline"), ["prompts_per_epoch=1", "updates_per_epoch=1", "epochs=1"]
    build_pipeline().save_pretrained(pipeline)
    threads = torch.get_num_threads()
    try:
        distributed_worker.run(tmp_path / "one", pipeline, *more)
    finally:
        torch.set_num_threads(threads)
    by_fork(3, lambda: distributed_worker.run(tmp_path / "three", pipeline, *more))
    one, *three = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "three-0", "three-1", "three-2"))
    assert [out["processes"] for out in three] == [3] * 3
    for out in three:
        for ours, theirs in zip((*out["x0"], *out["trained"]), (*one["x0"], *one["trained"]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_goes_on_in_every_process_own_stream(pipeline, tmp_path):
    """Of three pictures one process scores one and the other two."""

    def work():
        TASKS["shapes"] = Chance
        config = load_config("shapes", [f"pipeline={pipeline}", *SETTINGS, "prompts_per_epoch=1", "group_size=3"])
        whole = Trainer(config, tmp_path / "whole")
        whole.train()
        train_until(Trainer(config, tmp_path / "parts"), 1)
        resumed = Trainer(config, tmp_path / "parts", resume=True)
        resumed.train()
        assert all(map(torch.equal, whole.policy.trained, resumed.policy.trained))

    by_fork(2, work)


def test_processes_wait_for_a_checkpoint_or_a_reward_that_takes_longer_than_nccls_ten_minutes():
    def work():
        processes = Processes("cpu")
        group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout >= timedelta(hours=1)
        # The first one has what the other joins by.
        processes.wait()

    by_fork(2, work)


@pytest.mark.parametrize("total", [0, 1, 2, 3, 7, 288])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_cover_everything_once_and_evenly(total, count):
    processes = Processes("cpu")
    processes.count = count
    shares = [range(total)[processes.share(total, rank)] for rank in range(count)]
    assert [i for share in shares for i in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_gpu_for_several_processes_is_refused(monkeypatch):
    state = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    monkeypatch.setattr("nft.distributed.PartialState", lambda **_: state)
    with pytest.raises(ValueError, match="device: got 'cuda:1' for 2 processes, accepted are cuda and cpu"):
        Processes("cuda:1")
    assert Processes("cuda").count == 2


@pytest.mark.parametrize("key", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_launchers_variable_that_is_no_number_is_named(key, monkeypatch):
    monkeypatch.setenv(key, "x")
    with pytest.raises(ValueError, match=f"{key}: got 'x', accepted is a whole number"):
        Processes("cpu")


def test_a_rank_that_no_launcher_gives_is_not_waited_with(monkeypatch):
    for key, value in (("RANK", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="RANK: got 2 with WORLD_SIZE=2, accepted are ranks below it"):
        Processes("cpu")
