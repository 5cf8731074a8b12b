"""Rollouts of the bundled pipeline against diffusers' own call: ``python benchmarks/rollout.py``.

The plain way is ``StableDiffusion3Pipeline`` called with prompts, with the policy as an unmerged PEFT adapter; ours is
``nft.rollout.rollout``, merging included. Both draw the same prompts with as many Euler steps without guidance, decode
them, and take turns. ``nft`` reuses the embeddings of prompts that it has seen, as in an epoch; ``--fresh`` forgets
them before every turn.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from nft.config import load_config
from nft.policy import Policy
from nft.rollout import rollout
from nft.worlds.shapes.prompts import sample
from nft_kernels.models.vae import restore
from nft_kernels.provenance import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--fresh", action="store_true", help="encode the prompts every time")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings, such as device=cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy = Policy(load_config("shapes", options.set))
    if policy.device.type == "cuda":
        torch.cuda.set_device(policy.device.index or 0)
    official = Policy(load_config("shapes", [*options.set, "fused_transformer=false"]))
    with torch.no_grad():
        for pair in zip(policy.trained, official.trained, strict=True):
            change = 0.02 * torch.randn_like(pair[0])
            for parameter in pair:
                parameter.add_(change)
    entries = sample(held_out=True, per_group=options.pictures)
    prompts = [entries[i % len(entries)]["prompt"] for i in range(options.pictures)]
    restore(official.pipeline.vae)
    pipeline, seeds = official.pipeline, list(range(options.pictures))
    grid = policy.times(options.steps)

    def plain() -> None:
        official.use("default")
        pipeline(prompts, num_inference_steps=options.steps, guidance_scale=1.0, output_type="pt",
                 max_sequence_length=official._max_sequence_length)  # fmt: skip

    def ours() -> None:
        if options.fresh:
            policy._conditions.clear()
        with policy.merged("default"):
            x0 = rollout(policy, prompts, seeds, grid, "euler", options.pictures)
        policy.decode(x0)

    taken: dict[str, list[float]] = {"diffusers": [], "nft": []}
    plain(), ours()
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(taken["nft"]) < 5:
        for name, draw in (("diffusers", plain), ("nft", ours)):
            begin = time.perf_counter()
            draw()
            if policy.device.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    figures = {
        "pictures": options.pictures,
        "steps": options.steps,
        "fresh": options.fresh,
        "milliseconds_per_picture": {name: 1e3 * value / options.pictures for name, value in medians.items()},
        "speed_up": medians["diffusers"] / medians["nft"],
        "seconds": taken,
    }
    print(f"diffusers {medians['diffusers']:.3f} s, nft {medians['nft']:.3f} s: {figures['speed_up']:.2f}x")
    if options.json:
        write_report(options.json, "python benchmarks/rollout.py", policy.device, figures)


if __name__ == "__main__":
    main()
