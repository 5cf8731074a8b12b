"""What a run leaves to look at: a reward curve, picture grids and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from torch import Tensor


def save_grid(pictures: Tensor, prompts: list[str], path: Path, count: int = 24) -> None:
    """Write ``count`` of the pictures (B, H, W, 3), spread evenly, each under its prompt."""
    chosen = [i * len(prompts) // count for i in range(count)] if len(prompts) > count else range(len(prompts))
    rows = -(-len(chosen) // 6)
    figure, axes = plt.subplots(rows, 6, figsize=(12, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen, strict=False):
        axis.imshow(pictures[i].numpy())
        axis.set_title(prompts[i], fontsize=7, wrap=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(folder: Path) -> Path:
    """Plot metrics.jsonl to reward.png and gather everything in report.html.

    Returns:
        the path of the page.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for key, label, style in (
        ("reward", "training reward (partial credit)", "-"),
        ("strict", "training strict score", "-"),
        ("eval_strict", "held-out strict score", "o-"),
    ):
        points = [(line["epoch"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True) if points else ([], []), style, label=label)
    axis.set(xlabel="epoch", ylabel="score", ylim=(0, 1))
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(folder / "reward.png", dpi=120)
    plt.close(figure)

    def picture(name: str) -> str:
        path = folder / name
        if not path.exists():
            return ""
        return f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'

    scores = [line for line in lines if "eval_strict" in line]
    rows = "".join(
        f"<tr><td>{name.removeprefix('eval_')}</td><td>{scores[0][name]:.3f}</td><td>{scores[-1][name]:.3f}</td></tr>"
        for name in scores[0]
        if name.startswith("eval_")
    )
    config = html.escape(yaml.safe_dump(yaml.safe_load((folder / "config.yaml").read_text()), sort_keys=False))
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>DiffusionNFT run</title>
<style>body{{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}img{{max-width:100%}}
td,th{{padding:.2rem 1rem;text-align:left}}</style>
<h1>DiffusionNFT run</h1><p>{lines[-1]["epoch"]} epochs, {lines[-1]["step"]} optimizer steps.</p>
<h2>Held-out prompts, strict score</h2><table><tr><th>group</th><th>before</th><th>now</th></tr>{rows}</table>
<h2>Reward</h2>{picture("reward.png")}
<h2>Before</h2>{picture("before.png")}<h2>After</h2>{picture("after.png")}
<h2>Configuration</h2><pre>{config}</pre></html>"""
    (folder / "report.html").write_text(page)
    return folder / "report.html"
