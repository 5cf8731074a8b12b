"""What runs leave to look at: curves, picture grids and self-contained HTML pages."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from torch import Tensor

from .checkpoint import read_metrics
from .config import read_settings

_STYLE = """body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}
td,th{padding:.2rem 1rem;text-align:left}"""
_SCORES = (
    ("reward", "training reward", "-"),
    ("strict", "training score, as it is reported", "-"),
    ("eval_strict", "held-out score", "o-"),
)
_CURVES = ("eval_strict", "reward", "loss", "kl", "old_deviation", "grad_norm", "zero_variance_groups", "x0_rms")


def save_grid(pictures: Tensor, prompts: list[str], path: Path, count: int = 24) -> None:
    """Write ``count`` of the pictures (B, H, W, 3), spread evenly, each under its prompt."""
    chosen = [i * len(prompts) // count for i in range(count)] if len(prompts) > count else range(len(prompts))
    rows = -(-len(chosen) // 6)
    figure, axes = plt.subplots(rows, 6, figsize=(12, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen, strict=False):
        axis.imshow(pictures[i].numpy())
        # Between two dollar signs it would look for mathematics.
        axis.set_title(prompts[i].replace("$", r"\$"), fontsize=7, wrap=True)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curve(axis: Any, lines: list[dict[str, Any]], key: str, label: str, style: str = "-") -> None:
    points = [(line["epoch"], line[key]) for line in lines if key in line]
    axis.plot(*zip(*points, strict=True) if points else ([], []), style, label=label)
    axis.grid(alpha=0.3)


def _curves(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A picture of how each metric goes, of several runs over one another: ``_CURVES``, and every one of several
    rewards in training and on held-out prompts."""
    logged = dict.fromkeys(key for lines in runs.values() for line in lines for key in line)
    each = (key for key in logged if key.startswith(("reward_", "eval_reward_")) and not key.endswith("_std"))
    keys = [*_CURVES, *each]
    rows = -(-len(keys) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(12, 3.5 * rows), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        for name, lines in runs.items():
            # A dollar would begin mathematics, and an underscore hide the name.
            _curve(axis, lines, key, f" {name}".replace("$", r"\$"), "o-" if key.startswith("eval") else "-")
        axis.set(xlabel="epoch", title=key)
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return _embedded(buffer.getvalue())


def _embedded(data: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _page(title: str, body: str) -> str:
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}<h1>{title}</h1>{body}</html>'


def write_report(folder: Path) -> Path:
    """Plot metrics.jsonl to reward.png and gather everything in report.html.

    Returns:
        the path of the page.

    Raises:
        FileNotFoundError, ValueError: a folder without metrics, or files in it that are damaged.
    """
    lines = read_metrics(folder)
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for key, label, style in _SCORES:
        _curve(axis, lines, key, label, style)
    axis.set(xlabel="epoch", ylabel="score")
    axis.legend()
    figure.savefig(folder / "reward.png", dpi=120)
    plt.close(figure)

    def picture(name: str) -> str:
        path = folder / name
        return _embedded(path.read_bytes()) if path.exists() else ""

    # A run that was killed early has not been evaluated.
    scores = [line for line in lines if "eval_strict" in line] or [{}]
    rows = "".join(
        f"<tr><td>{html.escape(name.removeprefix('eval_'))}</td><td>{scores[0][name]:.3f}</td><td>{scores[-1][name]:.3f}</td></tr>"
        for name in scores[0]
        if name.startswith("eval_") and not name.endswith("_std") and name in scores[-1]
    )
    alarms = "".join(
        f"<li>epoch {line['epoch']}: {html.escape(message)}</li>"
        for line in lines
        for message in line.get("alarms", [])
    )
    config = html.escape(yaml.safe_dump(read_settings(folder / "config.yaml"), sort_keys=False))
    body = f"""<p>{lines[-1]["epoch"]} epochs, {lines[-1]["step"]} optimizer steps.</p>
<h2>Held-out prompts</h2><table><tr><th>group</th><th>before</th><th>now</th></tr>{rows}</table>
<h2>Reward</h2>{picture("reward.png")}
<h2>Alarms</h2><ul>{alarms or "<li>none</li>"}</ul>
<h2>Curves</h2>{_curves({"": lines})}
<h2>Before</h2>{picture("before.png")}<h2>After</h2>{picture("after.png")}
<h2>Configuration</h2><pre>{config}</pre>"""
    (folder / "report.html").write_text(_page("DiffusionNFT run", body), encoding="utf-8")
    return folder / "report.html"


def write_comparison(folders: list[Path], output: Path) -> Path:
    """One page about several runs: curves of each metric over one another, final scores, what their settings differ in,
    and the pictures they ended with.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError, ValueError: a folder without metrics, or files in it that are damaged.
    """
    runs = {str(folder): read_metrics(folder) for folder in folders}

    def final(lines: list[dict[str, Any]], key: str) -> str:
        values = [line[key] for line in lines if key in line]
        return f"{values[-1]:.3f}" if values else ""

    scores = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{lines[-1]['epoch']}</td>"
        + "".join(f"<td>{final(lines, key)}</td>" for key, _, _ in _SCORES)
        + f"<td>{sum(line.get('seconds', 0) for line in lines):.0f}</td></tr>"
        for name, lines in runs.items()
    )
    settings = [read_settings(folder / "config.yaml") for folder in folders]
    keys = [
        key for key in dict.fromkeys(k for s in settings for k in s) if len({str(s.get(key)) for s in settings}) > 1
    ]
    differences = "".join(
        f"<tr><td>{html.escape(str(key))}</td>"
        + "".join(f"<td>{html.escape(str(s.get(key)))}</td>" for s in settings)
        + "</tr>"
        for key in keys
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in runs)
    pictures = "".join(
        f"<h3>{html.escape(str(folder))}</h3>{_embedded((folder / 'after.png').read_bytes())}"
        for folder in folders
        if (folder / "after.png").is_file()
    )
    columns = "".join(f"<th>{label}</th>" for _, label, _ in _SCORES)
    body = f"""<table><tr><th>run</th><th>epochs</th>{columns}<th>seconds</th></tr>{scores}</table>
<h2>Curves</h2>{_curves(runs)}
<h2>Settings that differ</h2><table><tr><th></th>{heads}</tr>{differences}</table>
<h2>Pictures at the end</h2>{pictures}"""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_page("DiffusionNFT runs", body), encoding="utf-8")
    return output
