"""``nft plan`` against what runs: memory of a backward, and seconds of an epoch.

    python -m benchmarks.plan --output benchmarks/results/plan.json

The memory is what a micro-batch allocates at its peak, activations and gradient. The plan's seconds are those of the
transformer with the matrix rate that this machine reaches on one large product; the measured ones have everything.
FLOPs and evaluations are compared in ``tests/nft/test_plan.py``.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from nft.config import load_config
from nft.console import quieten_libraries
from nft.plan import matrix_rate, plan
from nft.trainer import Trainer
from nft_kernels.bench import peak_and_launches
from nft_kernels.provenance import write_report

CASES = {
    "lora": [],
    "lora, kl": ["kl_weight=0.01"],
    "lora, gradient checkpointing": ["gradient_checkpointing=true"],
    "lora, bfloat16": ["dtype=bfloat16"],
    "full": ["adapter=full"],
}
SMALL = ["prompts_per_epoch=8", "group_size=12", "rollout_batch=32", "preflight=false", "verify_kernels_steps=0",
         "fused_transformer=false"]  # fmt: skip


def measure(overrides: list[str], folder: Path, rate: float) -> dict[str, float]:
    """Planned and measured costs of the second epoch of a run: in the first the old policy is not evaluated."""
    config = load_config("shapes", [*SMALL, *overrides])
    planned = plan(config, tflops=rate)
    trainer = Trainer(config, folder)
    trainer.optimize(trainer.sample())
    data = trainer.sample()
    t = trainer.grid[1].item()
    pairs = [(i % len(data["prompts"]), t, i) for i in range(config.micro_batch)]
    megabytes, _ = peak_and_launches(lambda: trainer._accumulate(data, pairs), trainer.policy.device)
    trainer.optimizer.zero_grad()
    begin = time.perf_counter()
    trainer.optimize(trainer.sample())
    seconds = time.perf_counter() - begin
    return {
        "planned_bytes": planned.memory["activations"] + 4 * planned.trained_parameters,
        "measured_bytes": round(megabytes * 1e6),
        "planned_seconds": planned.seconds,
        "measured_seconds": seconds,
    }


def main(output: Annotated[Path, typer.Option(help="JSON file")] = Path("benchmarks/results/plan.json")) -> None:
    quieten_libraries()
    rate, results = matrix_rate(), {}
    for name, overrides in CASES.items():
        with TemporaryDirectory() as folder:
            results[name] = measure(overrides, Path(folder) / "run", rate)
        print(name, {key: f"{value:.4g}" for key, value in results[name].items()}, flush=True)
    write_report(output, "python -m benchmarks.plan", torch.device("cpu"), {"tflops": rate, "cases": results})


if __name__ == "__main__":
    typer.run(main)
