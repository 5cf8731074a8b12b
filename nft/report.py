"""What runs leave to look at: curves, picture grids and self-contained HTML pages."""

from __future__ import annotations

import base64
import html
import io
import os
import textwrap
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from torch import Tensor

from .files import read_metrics, reading, replace_text, replacing
from .settings import read_settings

_STYLE = """body{font:16px system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}
td,th{padding:.2rem 1rem;text-align:left}"""
_SCORES = (
    ("reward", "training reward", "-"),
    ("strict", "training score, as it is reported", "-"),
    ("eval_strict", "held-out score", "o-"),
)
# Pictures of a grid.
_SHOWN = 24
_CURVES = ("eval_strict", "reward", "loss", "kl", "old_deviation", "grad_norm", "zero_variance_groups", "x0_rms")


def _plain(text: str) -> str:
    """Of a figure; between two dollar signs it would look for mathematics."""
    return text.replace("$", r"\$")


def _save(figure: Any, path: Path, dpi: int) -> None:
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=dpi, format="png")
    plt.close(figure)


def shown(total: int) -> Sequence[int]:
    """Which of so many pictures a grid has, spread evenly."""
    return [i * total // _SHOWN for i in range(_SHOWN)] if total > _SHOWN else range(total)


def save_grid(pictures: Tensor, prompts: list[str], path: Path) -> None:
    """Write those of the pictures (B, H, W, 3) that are ``shown``, each under the first words of its prompt."""
    chosen = shown(len(prompts))
    rows = -(-len(chosen) // 6)
    figure, axes = plt.subplots(rows, 6, figsize=(12, 2.2 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, chosen, strict=False):
        axis.imshow(pictures[i].numpy())
        lines = textwrap.wrap(prompts[i], 34, max_lines=3, placeholder=" ...")
        axis.set_title(_plain("\n".join(lines)), fontsize=7)
    figure.tight_layout()
    _save(figure, path, 110)


@dataclass(frozen=True)
class _Run:
    lines: list[dict[str, Any]]
    settings: dict[str, Any]
    begins: list[int]
    """After how many epochs each further stage has begun, so far."""

    def stage(self, line: dict[str, Any]) -> int:
        """Which one a line was logged in: after a stage's last epoch it is evaluated with its own rewards."""
        return bisect_left(self.begins, line["epoch"])


def _read(folder: Path) -> _Run:
    lines, settings = read_metrics(folder), read_settings(folder / "config.yaml")
    with reading(folder / "config.yaml", "config"):
        ends = accumulate(int(stage["epochs"]) for stage in settings.get("stages", ()))
        return _Run(lines, settings, [end for end in ends if end < lines[-1]["epoch"]])


def _curve(axis: Any, run: _Run, key: str, label: str, style: str = "-") -> None:
    # A KL of 0 is one that was not evaluated, as without kl_weight.
    points = [(line["epoch"], line[key]) for line in run.lines if key in line and (key != "kl" or line[key] != 0)]
    # One point makes no line.
    style = "o" if len(points) == 1 else style
    (drawn,) = axis.plot(*zip(*points, strict=True) if points else ([], []), style, label=label)
    for begin in run.begins:
        axis.axvline(begin + 0.5, linestyle=":", color=drawn.get_color())
    axis.grid(alpha=0.3)


def _score(value: float) -> str:
    return f"{value:.4g}"


def _curves(runs: dict[str, _Run]) -> str:
    """A picture of how each metric goes, of several runs over one another: ``_CURVES``, and every one of several
    rewards in training and on held-out prompts."""
    logged = dict.fromkeys(key for run in runs.values() for line in run.lines for key in line)
    each = (key for key in logged if key.startswith(("reward_", "eval_reward_")) and not key.endswith("_std"))
    keys = [*_CURVES, *each]
    rows = -(-len(keys) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(12, 3.5 * rows), squeeze=False)
    for axis, key in zip(axes.flat, keys, strict=False):
        for i, (name, run) in enumerate(runs.items()):
            # Colors come again after ten.
            dashes = ("-", "--", "-.")[i // 10 % 3]
            # An underscore at its beginning would hide the name.
            _curve(axis, run, key, f" {_plain(name)}", f"o{dashes}" if key.startswith("eval") else dashes)
        axis.set(xlabel="epoch", title=_plain(key))
    for axis in axes.flat[len(keys) :]:
        axis.axis("off")
    if len(runs) > 1:
        axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return _embedded(buffer.getvalue())


def _alarms(lines: list[dict[str, Any]]) -> str:
    """An item for every alarm with what it said last: one may be raised in each of ten thousand epochs."""
    raised: dict[str, list[tuple[int, str]]] = {}
    for line in lines:
        for message in line.get("alarms", []):
            raised.setdefault(message.partition(":")[0], []).append((line["epoch"], message))
    items = []
    for times in raised.values():
        epoch, message = times[-1]
        often = f", the last of {len(times)} since epoch {times[0][0]}" if len(times) > 1 else ""
        items.append(f"<li>epoch {epoch}{often}: {html.escape(message)}</li>")
    return "".join(items)


def _embedded(data: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _row(cells: Iterable[object], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(str(cell))}</{tag}>' for cell in cells)}</tr>"


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
    run = _read(folder)
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for key, label, style in _SCORES:
        _curve(axis, run, key, label, style)
    axis.set(xlabel="epoch", ylabel="score")
    axis.legend()
    _save(figure, folder / "reward.png", 120)

    def picture(name: str) -> str:
        path = folder / name
        return _embedded(path.read_bytes()) if path.exists() else ""

    # A run that was killed early has not been evaluated.
    scores = [line for line in run.lines if "eval_strict" in line] or [{"epoch": 0}]
    # Another stage's scores are of other rewards.
    first, last = next(line for line in scores if run.stage(line) == run.stage(scores[-1])), scores[-1]
    rows = "".join(
        _row([name.removeprefix("eval_"), _score(first[name]) if name in first else "", _score(value)])
        for name, value in last.items()
        if name.startswith("eval_") and not name.endswith("_std")
    )
    config = html.escape(yaml.safe_dump(run.settings, sort_keys=False))
    body = f"""<p>{run.lines[-1]["epoch"]} epochs, {run.lines[-1]["step"]} optimizer steps.</p>
<h2>Held-out prompts</h2><table>{_row(("group", "before", "now"), "th")}{rows}</table>
<h2>Reward</h2>{picture("reward.png")}
<h2>Alarms</h2><ul>{_alarms(run.lines) or "<li>none</li>"}</ul>
<h2>Curves</h2>{_curves({"": run})}
<h2>Before</h2>{picture("before.png")}<h2>After</h2>{picture("after.png")}
<h2>Configuration</h2><pre>{config}</pre>"""
    replace_text(folder / "report.html", _page("DiffusionNFT run", body))
    return folder / "report.html"


def write_comparison(folders: list[Path], output: Path) -> Path:
    """One page about several runs: curves of each metric over one another, final scores, what their settings differ in,
    and the pictures they ended with.

    Returns:
        ``output``.

    Raises:
        FileNotFoundError, ValueError: a folder without metrics, or files in it that are damaged.
    """
    # A name on a disk may be no text.
    runs = {os.fsencode(folder).decode(errors="replace"): _read(folder) for folder in folders}
    if len(runs) < len(folders):
        raise ValueError(f"runs: got {', '.join(map(str, folders))}, accepted are different ones")

    def final(lines: list[dict[str, Any]], key: str) -> str:
        values = [line[key] for line in lines if key in line]
        return _score(values[-1]) if values else ""

    scores = _row(["run", "epochs", *(label for _, label, _ in _SCORES), "seconds"], "th")
    for name, run in runs.items():
        seconds = sum(line.get("seconds", 0) for line in run.lines)
        ends = (final(run.lines, key) for key, _, _ in _SCORES)
        scores += _row([name, run.lines[-1]["epoch"], *ends, f"{seconds:.0f}"])
    settings = [run.settings for run in runs.values()]
    keys = [
        key for key in dict.fromkeys(k for s in settings for k in s) if len({str(s.get(key)) for s in settings}) > 1
    ]
    differences = "".join(_row([key, *(s.get(key) for s in settings)]) for key in keys)
    pictures = "".join(
        f"<h3>{html.escape(name)}</h3>{_embedded((folder / 'after.png').read_bytes())}"
        for name, folder in zip(runs, folders, strict=True)
        if (folder / "after.png").is_file()
    )
    body = f"""<table>{scores}</table>
<h2>Curves</h2>{_curves(runs)}
<h2>Settings that differ</h2><table>{_row(["", *runs], "th")}{differences}</table>
<h2>Pictures at the end</h2>{pictures}"""
    replace_text(output, _page("DiffusionNFT runs", body))
    return output
