"""An epoch's drawing beside a slow reward, against the longer of the two: ``python benchmarks/overlap.py``."""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from nft.config import load_config
from nft.console import quieten_libraries
from nft.rewards.base import Metadata, Reward
from nft.trainer import Trainer
from nft_kernels.provenance import write_report


class Slow(Reward):
    """Takes its time for every batch, in a process of its own."""

    batch = 1024

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Tensor:
        time.sleep(self.seconds)
        return torch.zeros(len(pictures))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.05, 0.2, 0.5], help="of a batch's scoring")
    parser.add_argument("--epochs", type=int, default=2, help="timed ones of each, after one that is not")
    parser.add_argument("--set", nargs="*", default=["rollout_batch=8"], metavar="KEY=VALUE", help="settings of all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quieten_libraries()
    trainers = {}
    taken: dict[float, list[float]] = {seconds: [] for seconds in (0.0, *options.seconds)}
    with tempfile.TemporaryDirectory() as folder:
        for seconds in taken:
            slow = json.dumps({"slow": {"reward": "overlap:Slow", "options": {"seconds": seconds}}})
            task = ["task=rewards", "prompts=shapes", f"rewards={slow}"] if seconds else []
            config = load_config("shapes", [*task, *options.set])
            trainers[seconds] = Trainer(config, Path(folder) / str(seconds))
        for epoch in range(options.epochs + 1):
            for seconds, trainer in trainers.items():
                begin = time.perf_counter()
                trainer.sample()
                if epoch:
                    taken[seconds].append(time.perf_counter() - begin)
        device = trainers[0.0].policy.device
    batches = -(-config.prompts_per_epoch * config.group_size // config.rollout_batch)
    drawing, *both = map(statistics.median, taken.values())
    print(f"drawing {batches} batches: {drawing:.2f} s")
    ratios = {}
    for seconds, median in zip(options.seconds, both, strict=True):
        scoring = batches * seconds
        ratios[seconds] = median / max(drawing, scoring)
        print(f"scoring them takes {scoring:.2f} s: both {median:.2f} s, {ratios[seconds]:.2f} of the longer")
    if options.json:
        figures = {"batches": batches, "seconds": taken, "ratios": ratios}
        write_report(options.json, "python benchmarks/overlap.py", device, figures)


if __name__ == "__main__":
    main()
