"""Epochs of the toy run against the same epochs by plain means: ``python benchmarks/epoch.py``.

The plain means are the reference backend, rollouts with diffusers' transformer and the unmerged PEFT adapter, and one
call of the VAE for all pictures of a batch as the pipeline makes it. Both trainers start from the same policy, draw and
train on as many pictures, and take turns.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from nft.config import load_config
from nft.console import quieten_libraries
from nft.policy import Policy
from nft.trainer import Trainer
from nft_kernels.models.vae import restore
from nft_kernels.provenance import write_report


class PlainPolicy(Policy):
    @contextmanager
    def merged(self, adapter: str, *, float8: bool = False) -> Iterator[None]:
        self.use(adapter)
        yield
        self.use("default")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        pictures = self.pipeline.image_processor.postprocess(decoded, output_type="pt")
        return (255 * pictures).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5, help="timed ones of each, after one that is not")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quieten_libraries()
    trainers, taken = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "nft"):
            plainly = ["fused_transformer=false"] if name == "plain" else []
            trainers[name] = Trainer(load_config("shapes", [*options.set, *plainly]), Path(folder) / name)
            taken[name] = {"rollout": [], "training": []}
        plain = trainers["plain"].policy
        plain.__class__ = PlainPolicy
        restore(plain.pipeline.vae)
        for epoch in range(options.epochs + 1):
            for name, trainer in trainers.items():
                os.environ["NFT_KERNELS_BACKEND"] = "reference" if name == "plain" else "auto"
                begin = time.perf_counter()
                data = trainer.sample()
                middle = time.perf_counter()
                trainer.optimize(data)
                end = time.perf_counter()
                if epoch:
                    taken[name]["rollout"].append(middle - begin)
                    taken[name]["training"].append(end - middle)
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in taken.items()
    }
    seconds = {name: sum(parts.values()) for name, parts in medians.items()}
    speed_up = seconds["plain"] / seconds["nft"]
    for name, parts in medians.items():
        print(f"{name}: " + ", ".join(f"{part} {value:.2f} s" for part, value in parts.items()))
    print(f"an epoch: {seconds['plain']:.2f} s and {seconds['nft']:.2f} s, {speed_up:.2f}x")
    if options.json:
        figures = {"medians": medians, "speed_up": speed_up, "seconds": taken}
        write_report(options.json, "python benchmarks/epoch.py", trainers["nft"].policy.device, figures)


if __name__ == "__main__":
    main()
