"""The commands of the README's figures run, here on next to nothing: what they measure is for benchmarks/results."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "rollout": ["--pictures", "2", "--steps", "2", "--seconds", "0.1"],
    "decode": ["--pictures", "2", "--rounds", "1"],
    "epoch": ["--epochs", "1", "--set", "prompts_per_epoch=2", "group_size=2", "timesteps_per_sample=1",
              "updates_per_epoch=1", "rollout_steps=2"],
    "overlap": ["--seconds", "0.01", "--epochs", "1", "--set", "prompts_per_epoch=2", "group_size=2",
                "rollout_batch=2", "rollout_steps=3"],
    "sd35": ["--device", "cpu", "--layers", "1", "--heads", "2", "--resolution", "64", "--steps", "2",
             "--rollout-batches", "1", "--micro-batch", "1", "--seconds", "0.1", "--no-compile"],
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_script(name, tmp_path, monkeypatch):
    monkeypatch.setenv("NFT_KERNELS_BACKEND", "auto")  # and put back what the script makes of it
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *TINY[name], "--json", str(tmp_path / "out.json")])
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    report = json.loads((tmp_path / "out.json").read_text())
    assert {"command", "date", "device", "versions"} <= report.keys()


def test_plan(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS.parent)
    measure = runpy.run_path(str(BENCHMARKS / "plan.py"))["measure"]
    costs = measure(["lora_rank=4", "rollout_steps=2", "timesteps_per_sample=1"], tmp_path / "run", 1.0)
    assert costs["planned_bytes"] == pytest.approx(costs["measured_bytes"], rel=0.1)
