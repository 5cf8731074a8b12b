"""The bundled pipeline's decoder against diffusers' own: ``python benchmarks/decode.py``.

Both decode the same latents, sixteen at a time, and take turns.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from nft.policy import SHAPES_PIPELINE
from nft_kernels.models.vae import accelerate
from nft_kernels.provenance import write_report


def load() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(SHAPES_PIPELINE / "vae").eval().requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=20, help="timed ones, after one that is not")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    vaes = {"diffusers": load(), "nft": load()}
    accelerate(vaes["nft"])
    size = vaes["nft"].config.sample_size // 2 ** (len(vaes["nft"].config.block_out_channels) - 1)
    latents = torch.randn(options.pictures, vaes["nft"].config.latent_channels, size, size)
    latents = latents.contiguous(memory_format=torch.channels_last)
    taken: dict[str, list[float]] = {name: [] for name in vaes}
    for turn in range(options.rounds + 1):
        for name, vae in vaes.items():
            begin = time.perf_counter()
            for part in latents.split(16):
                vae.decode(part)
            if turn:
                taken[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    speed_up = medians["diffusers"] / medians["nft"]
    print(f"diffusers {medians['diffusers']:.3f} s, nft {medians['nft']:.3f} s: {speed_up:.2f}x")
    if options.json:
        figures = {"pictures": options.pictures, "medians": medians, "speed_up": speed_up, "seconds": taken}
        write_report(options.json, "python benchmarks/decode.py", torch.device("cpu"), figures)


if __name__ == "__main__":
    main()
