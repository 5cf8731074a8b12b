"""One process of a training run, as ``torchrun`` or ``accelerate launch`` starts it: FOLDER PIPELINE."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from nft.config import load_config
from nft.tasks import TASKS, Shapes
from nft.trainer import Trainer

LOCAL = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# 4 pictures and 2 pairs an update: with three processes the shares are uneven, and in every update one has no pair.
SETTINGS = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=3", "timesteps_per_sample=1", "micro_batch=2",
            "rollout_batch=2", "updates_per_epoch=2", "eval_prompts_per_group=1", "eval_steps=2", "epochs=2",
            "lora_rank=4", "kl_weight=0.1", "learning_rate=1e-4", "keep_checkpoints=1"]  # fmt: skip


class Brightness(Shapes):
    """Something that differs between the pictures of an untrained pipeline."""

    def score(self, pictures, entries):
        return (pictures.float().mean((1, 2, 3)) / 255)[:, None].expand(-1, 2).clone()


class Chance(Brightness):
    """A reward that draws from torch's own stream, as one with dropout does."""

    def score(self, pictures, entries):
        return super().score(pictures, entries) + torch.rand(len(pictures), 1)


def run(folder: Path, pipeline: str, *more: str) -> None:
    """Train, and leave what came out beside the run's folder, by rank."""
    torch.set_num_threads(1)
    TASKS["shapes"] = Brightness
    trainer = Trainer(load_config("shapes", [f"pipeline={pipeline}", *SETTINGS, *more]), folder)
    epochs, sample = [], trainer.sample

    def recorded():
        epochs.append(sample())
        return epochs[-1]

    trainer.sample = recorded
    trainer.train()
    out = {
        "processes": trainer.processes.count,
        "r": [epoch["r"] for epoch in epochs],
        "x0": [epoch["x0"] for epoch in epochs],
        "trained": [p.detach() for p in trainer.policy.trained],
        "old": [p.detach() for p in trainer.policy._old],
        "ema": trainer.ema.shadow_params,
    }
    torch.save(out, folder.parent / f"{folder.name}-{trainer.processes.rank}.pt")


def train_until(trainer, epoch):
    """Train, and break off as Ctrl-C does once that epoch is saved."""

    def interrupt(metrics):
        if trainer.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.train(interrupt)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def by_fork(count, work, seconds=300):
    """Let ``count`` processes do ``work()`` as torchrun would start them, without importing everything once more."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({k: str(v) for k, v in numbers.items()})
            os.environ.update(LOCAL, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            PartialState._reset_state()
            # The parent's threads are not in a fork, which would wait for them for ever.
            torch.set_num_threads(1)
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes, end = {}, time.monotonic() + seconds
    while len(codes) < count:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end or any(codes.values()):
                    # A process that waits for another one that has failed waits for long.
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    assert list(codes.values()) == [0] * count


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
