"""The command ``nft eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from .console import bars, console, failing, quieten_libraries, say

if TYPE_CHECKING:
    from .config import Config

# What the pictures depend on besides pipeline, weights, prompts and solver.
_SAMPLING = {"resolution", "dtype", "max_sequence_length", "timestep_spacing", "fused_transformer", "float8_rollout",
             "compile_rollout"}  # fmt: skip


# And what else a policy is built by that only samples.
_READ = _SAMPLING | {"plugins", "pipeline", "device", "offload", "rollout_batch", "cuda_graphs"}


def sampling_settings(config: str | None, checkpoint: Path | None, default: str, overrides: list[str]) -> Config:
    """The settings that pictures are drawn with: of a configuration, else of the checkpoint's run, else by default.

    Raises:
        ValueError: an override of a setting that only training reads, or one that ``load_config`` refuses.
    """
    from .config import Config, load_config
    from .settings import saved_settings

    for override in overrides:
        key = override.partition("=")[0].partition(".")[0]
        if key in Config.model_fields and key not in _READ:
            accepted = ", ".join(name for name in Config.model_fields if name in _READ)
            raise ValueError(f"override: got {override!r}, which only training reads; accepted are {accepted}")
    own = saved_settings(checkpoint) if checkpoint else None
    return load_config(config or own or default, overrides)


def pairs(settings: list[str] | None, label: str) -> dict[str, str]:
    """``NAME=VALUE`` settings by name.

    Raises:
        ValueError: one without a name or a value, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for setting in settings or []:
        name, separator, value = setting.partition("=")
        if not name or not separator:
            raise ValueError(f"{label}: got {setting!r}, accepted is NAME=VALUE")
        if name in found:
            raise ValueError(f"{label}: got {setting!r} beside {name}={found[name]}, accepted is one of them")
        found[name] = value
    return found


def _cell(result: dict[str, Any]) -> str:
    if "mean" not in result:
        return "-"
    interval = f" [{result['low']:.3f}, {result['high']:.3f}]" if "low" in result else ""
    return f"{result['mean']:.3f}{interval}"


def _print(evaluation: Any, results: dict[str, dict[str, Any]], options: Any, compared: bool) -> None:
    listing = Table("", *results)
    listing.add_row("this checkpoint", *(escape(_cell(result)) for result in results.values()))
    if compared:
        rows = results.values()
        listing.add_row("- baseline", *(f"{r['difference']:+.3f}" if "difference" in r else "-" for r in rows))
        listing.add_row("p, paired", *(f"{r['p']:.4f}" if "p" in r else "-" for r in rows))
        listing.add_row("after Holm", *(f"{r['p_holm']:.4f}" if "p" in r else "-" for r in rows))
    for row, values in evaluation.suite.published.items():
        listing.add_row(row, *(f"{values[title]:g}" if title in values else "-" for title in results))
    console.print(listing)
    if evaluation.suite.published:
        console.print(f"published rows: {evaluation.suite.source}")
        if evaluation.generated:
            sets = ", ".join(evaluation.generated)
            console.print(f"{sets}: prompts of our own and not those of the published rows; give --prompts SET=FILE")
        if "UniRwd" in results and "question" not in options.get("unifiedreward", {}):
            console.print("UniRwd: asked in our own words; give --set unifiedreward.question=TEXT for others")
    for title, result in results.items():
        if "left_out" in result:
            say(f"{title} left out: {result['left_out']}")
        elif compared and "difference" not in result:
            say(f"{title} not compared: the baseline has no scores of it")
        if "unanswered" in result:
            say(f"{title}: pictures without an answer: {result['unanswered']}")


def evaluate(
    checkpoint: Annotated[
        Path | None, typer.Option(help="run, checkpoint or folder of weights; none is the base")
    ] = None,
    suite: Annotated[str, typer.Option(help="paper or shapes")] = "shapes",
    output: Annotated[Path | None, typer.Option(help="folder of the evaluation; evals/SUITE by default")] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="SET=FILE, prompts in place of the suite's")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="prompts of each set and task group")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, max=1000, help="pictures of each prompt")] = 1,
    guidance: Annotated[float | None, typer.Option(min=0, help="scale of classifier-free guidance")] = None,
    baseline: Annotated[Path | None, typer.Option(help="folder of another evaluation to compare with")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="REWARD.KEY=VALUE, a reward's option")] = None,
    config: Annotated[
        str | None, typer.Option(help="configuration of the pipeline; the checkpoint's own or the suite's by default")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--override", help="key=value of the configuration")] = None,
) -> None:
    """Evaluate a checkpoint: GenEval, OCR and preference rewards on pinned prompts, seeds and solver."""
    from .checkpoint import CheckpointError
    from .config import check_float32, usable_device
    from .distributed import Processes
    from .evaluate import SUITES, Evaluation, read_settings
    from .rewards.cli import reward_options

    folder = output or Path("evals") / suite
    with failing(CheckpointError, OSError, ValueError):
        files = {name: Path(path) for name, path in pairs(prompts, "--prompts").items()}
        if suite not in SUITES:
            raise ValueError(f"suite: got {suite!r}, accepted are {', '.join(SUITES)}")
        run = sampling_settings(config, checkpoint, SUITES[suite].config, overrides or [])
        usable_device(run.device)
        subject = _subject(run.pipeline, checkpoint)
        processes = Processes(run.device)
        console.quiet = not processes.main
        same: dict[str, Any] = {"files": files, "limit": limit, "per_prompt": per_prompt}
        sampling = run.model_dump(include=_SAMPLING)
        if guidance is not None:
            check_float32("guidance", guidance)
            sampling["guidance"] = guidance
        evaluation = Evaluation(suite, folder, subject=subject, sampling=sampling, **same)
        other = None
        if baseline is not None:
            if baseline.resolve() == folder.resolve():
                raise ValueError(
                    f"baseline: got {baseline}, which is the output; accepted is another evaluation's folder"
                )
            begun = read_settings(baseline, "baseline")
            theirs = {key: begun[key] for key in (*_SAMPLING, "guidance") if key in begun}
            other = Evaluation(suite, baseline, subject=begun["subject"], sampling=theirs, key="baseline", **same)
        chosen = SUITES[suite]
        options = reward_options(settings or [], [column.reward for column in chosen.columns])
        quieten_libraries()
        evaluation.check(options, other)
        if evaluation.missing():
            _draw(evaluation, run, checkpoint, processes, guidance)
        if not processes.main:
            return
        with console.status("") as status:
            evaluation.score(options, device=run.device, on_reward=lambda name: status.update(f"scoring: {name}"))
        results = evaluation.results(other)
    _print(evaluation, results, options, other is not None)
    say(f"pictures, scores and results: {folder}")


def _subject(pipeline: str, checkpoint: Path | None) -> str:
    """What is evaluated, by content: a run's checkpoint changes as it is trained on."""
    from .files import checksum
    from .weights import find_weights

    if checkpoint is None:
        return pipeline
    return f"{pipeline} with {checkpoint}, sha256 {checksum(find_weights(checkpoint))}"


def _draw(evaluation: Any, run: Any, checkpoint: Path | None, processes: Any, guidance: float | None) -> None:
    from .full import load_policy
    from .rollout import rollout

    policy, suite = load_policy(run, checkpoint), evaluation.suite
    grid = policy.times(suite.steps)
    with bars() as progress, policy.merged("default"):
        bar = progress.add_task("drawing", total=None)
        evaluation.draw(
            lambda texts, seeds: policy.decode(
                rollout(policy, texts, seeds, grid, suite.solver, run.rollout_batch, guidance=guidance)
            ),
            run.rollout_batch,
            lambda done, total: progress.update(bar, completed=done, total=total),
            processes,
        )
