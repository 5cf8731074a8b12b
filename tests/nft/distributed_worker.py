"""One process of a training run, as ``torchrun`` or ``accelerate launch`` starts it: FOLDER PIPELINE."""

import sys
from pathlib import Path

import torch

from nft.config import load_config
from nft.tasks import TASKS, Shapes
from nft.trainer import Trainer

# 4 pictures and 2 pairs an update: with three processes the shares are uneven, and in every update one has no pair.
SETTINGS = ["prompts_per_epoch=2", "group_size=2", "rollout_steps=3", "timesteps_per_sample=1", "micro_batch=2",
            "rollout_batch=2", "updates_per_epoch=2", "eval_prompts_per_group=1", "eval_steps=2", "epochs=2",
            "lora_rank=4", "kl_weight=0.1", "learning_rate=1e-4", "keep_checkpoints=1"]  # fmt: skip


class Brightness(Shapes):
    """Something that differs between the pictures of an untrained pipeline."""

    def score(self, pictures, entries):
        return (pictures.float().mean((1, 2, 3)) / 255)[:, None].expand(-1, 2).clone()


def run(folder: Path, pipeline: str) -> None:
    """Train, and leave what came out beside the run's folder, by rank."""
    torch.set_num_threads(1)
    TASKS["shapes"] = Brightness
    trainer = Trainer(load_config("shapes", [f"pipeline={pipeline}", *SETTINGS]), folder)
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


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2])
