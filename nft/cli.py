"""Command line: ``nft train``, ``nft plan``, ``nft sample``, ``nft export``, ``nft report`` and others."""

from __future__ import annotations

import io
import itertools
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from .console import bars, catalog, console, fail, failing, quieten_libraries, say
from .evaluate_cli import evaluate
from .rewards.cli import reward_server, rewards
from .sample_cli import sample

if TYPE_CHECKING:
    from torch import Tensor

    from .config import Config

# What Ctrl-C leaves of a command; ``train`` says more.
_LEFT = {
    "compare": "the same command goes on where it was",
    "eval": "the same command goes on where it was",
    "sample": "the pictures drawn so far are kept",
}


_NAMED = {"--config": "a name or a path", "--host": "an address"}
_NAMED |= dict.fromkeys(("--output", "--checkpoint", "--baseline", "--file", "--token-file"), "a path")


class _Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # An unset variable, which would be the current folder, any address or what is taken by default.
        for option, accepted in _NAMED.items():
            if f"{option}=" in args or (option, "") in itertools.pairwise(args):
                raise typer.BadParameter(f"got an empty name, accepted is {accepted}", ctx=ctx, param_hint=option)
        if args[:1] in (["export"], ["pretrain"], ["report"]) and "" in args:
            raise typer.BadParameter("got an empty name, accepted is a path", ctx=ctx)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and say what Ctrl-C leaves of it and what needs less where memory is not enough."""
        # As of errors: names may hold what the encoding lacks, or be no text at all.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            left = _LEFT.get(ctx.invoked_subcommand or "")
            say(f"stopped: {left}" if left else "stopped")
            raise typer.Exit(130) from None
        except typer.BadParameter as error:
            # Pydantic, by which typer may check, says what it accepts and not what came.
            if problems := getattr(error.__cause__, "errors", None):
                error.message = f"got {problems()[0]['input']!r}: {error.message}"
            raise
        except (MemoryError, RuntimeError) as error:
            # By name, as most commands do without torch, which has no class for a CPU's.
            kind, text = type(error).__name__, str(error)
            if kind.startswith("Dist") or "gloo" in text:
                problem = text.partition("\n")[0]
                raise fail(f"{problem}: another process may have ended; what it printed says why") from None
            if kind not in ("MemoryError", "OutOfMemoryError") and "DefaultCPUAllocator" not in text:
                raise
            what = text.partition(". ")[0] or "out of memory"
            less = "smaller rollout_batch and micro_batch, gradient_checkpointing=true and offload=true need less"
            raise fail(f"{what}: {less}, and `nft plan` says how much") from None


app = typer.Typer(
    cls=_Commands, help="DiffusionNFT: online reinforcement learning on the forward process.", no_args_is_help=True
)
_configs = typer.Typer(help="Look at configurations.", no_args_is_help=True)
app.add_typer(_configs, name="config")
app.command("eval")(evaluate)
app.command()(sample)
app.command()(rewards)
app.command()(reward_server)


def _run_settings(name: str, folder: Path, overrides: list[str], resume: bool) -> Config:
    """The settings of a run: those of a configuration, or of the run in the folder that is gone on with."""
    from .config import ConfigError, load_config

    saved = folder / "config.yaml"
    # Unlike a path's own exists it says no of a name that is too long.
    resumed = resume and os.path.exists(saved)
    try:
        return load_config(str(saved) if resumed else name, overrides)
    except ConfigError as error:
        raise fail(f"{error} (with the settings of {saved})" if resumed else error) from None


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings, such as epochs=20")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="bundled configuration or YAML file, shapes by default; with --resume it names the folder"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder of the run; runs/CONFIG by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the folder's checkpoint and settings")] = False,
    verify_kernels: Annotated[bool, typer.Option(help="compare the loss with the reference in the first steps")] = True,
) -> None:
    """Fine-tune a pipeline with DiffusionNFT."""
    from .config import ConfigError

    extra = [] if verify_kernels else ["verify_kernels_steps=0"]
    if resume and config and output:
        raise fail(f"config: got {config} with --resume, accepted is none: {output} has the run's settings")
    name = config or "shapes"
    folder = output or Path("runs") / Path(name).stem
    settings = _run_settings(name, folder, [*(overrides or []), *extra], resume)
    quieten_libraries()
    from nft_kernels.check import KernelMismatchError

    from .alarms import AlarmError
    from .checkpoint import CheckpointError, existing, manifest
    from .report import save_grid, write_report
    from .rewards.base import RewardError
    from .trainer import Trainer

    with failing(CheckpointError, RewardError, OSError, ValueError, TypeError):
        trainer = Trainer(settings, folder, resume=resume)
    main = trainer.processes.main
    console.quiet = not main
    if trainer.changes:
        differs = ", ".join(trainer.changes)
        text = f"resumed with {differs}: the run goes on, but not to the last bit as it would have"
        say(text, style="yellow")
    if resume and not trainer.epoch:
        say(f"resumed without a checkpoint, of which {folder} has none: the run begins anew", style="yellow")
    seen: dict[str, Any] = {}
    with bars() as progress:
        bar = progress.add_task("evaluating", total=settings.epochs, completed=trainer.epoch)

        def on_epoch(metrics: dict[str, Any]) -> None:
            seen.update(metrics)
            text = ", ".join(f"{k} {seen[k]:.3f}" for k in ("reward", "loss", "eval_strict") if k in seen)
            progress.update(bar, completed=trainer.epoch, description=text)
            if "eval_strict" in metrics:
                progress.print(f"epoch {trainer.epoch}: held-out score {metrics['eval_strict']:.3f}")
            elif not console.is_terminal:
                # A bar is not drawn into a file.
                progress.print(f"epoch {trainer.epoch} of {settings.epochs}: {text}, {metrics['seconds']:.1f} s")
            for message in metrics["alarms"]:
                progress.print(f"[yellow]epoch {trainer.epoch}, {escape(message)}[/yellow]")

        def on_eval(epoch: int, pictures: Tensor, prompts: list[str]) -> None:
            if main:
                grid = folder / "pictures" / f"epoch-{epoch:06d}.png"
                save_grid(pictures, prompts, grid)
                shutil.copy(grid, folder / ("after.png" if epoch else "before.png"))

        try:
            trainer.train(on_epoch, on_eval)
        except KeyboardInterrupt:
            progress.stop()
            command = ["nft", "train", "--output", str(folder), "--resume", *(overrides or [])]
            # The trainer may have counted an epoch that it had not saved yet.
            finished = existing(folder / "checkpoints")
            kept = finished and f"epoch {manifest(finished[-1])['epoch']} is saved; go on with\n  {shlex.join(command)}"
            say(f"stopped: {kept or 'no epoch was finished'}")
            raise typer.Exit(130) from None
        except (AlarmError, CheckpointError, ConfigError, KernelMismatchError, RewardError, OSError) as error:
            progress.stop()
            raise fail(error) from None
        finally:
            trainer.close()
    if main:
        with failing(OSError, ValueError):
            say(f"report: {write_report(folder)}")


@_configs.command("show")
def show(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings")] = None,
    config: Annotated[str, typer.Option(help="bundled configuration or YAML file")] = "shapes",
) -> None:
    """Print every setting of a configuration, and what it does, as a YAML file."""
    from .config import ConfigError, load_config

    with failing(ConfigError):
        typer.echo(load_config(config, overrides).dump(explained=True), nl=False)


@app.command()
def plan(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings")] = None,
    config: Annotated[str, typer.Option(help="bundled configuration or YAML file")] = "shapes",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, or processes on a CPU")] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="1e12 FLOPs that one reaches in a second; 300 by default, on a CPU what it has"),
    ] = None,
) -> None:
    """Estimate memory, evaluations, FLOPs and time of an epoch without loading anything."""
    from rich.table import Table

    from .config import load_config

    quieten_libraries()
    from .plan import matrix_rate, plan_stages

    with failing(ValueError):
        settings = load_config(config, overrides)
        if tflops is None:
            tflops = matrix_rate(1024) if settings.device == "cpu" else 300.0
        stages = plan_stages(settings, gpus, tflops=tflops)
    costs = stages[0]
    hours = sum(stage.epochs * each.seconds for stage, each in zip(settings.all_stages(), stages, strict=True)) / 3600
    what = "of the first stage " if len(stages) > 1 else ""
    device = "process" if settings.device == "cpu" else "GPU"
    unknown = "" if "text encoders and VAE" in costs.memory else "text encoders and VAE, which are not on disk, and "
    listing = Table(escape(f"one epoch {what}of {config} on {gpus}"), "", show_header=True)
    for name, text in (
        ("transformer", f"{costs.parameters / 1e6:,.1f} M parameters, {costs.trained_parameters / 1e6:,.2f} M trained"),
        ("rollout", f"{costs.rollout_evaluations:,} evaluations, {costs.rollout_flops / 1e12:,.3g} TFLOP"),
        ("training", f"{costs.training_evaluations:,} evaluations, {costs.training_flops / 1e12:,.3g} TFLOP"),
        ("held-out evaluation", f"{costs.held_out_evaluations:,} evaluations for every task group"),
        *((f"memory: {what}", f"{size / 2**30:.2f} GiB") for what, size in costs.memory.items()),
        (f"memory of one {device}", f"{sum(costs.memory.values()) / 2**30:.2f} GiB without {unknown}reward models"),
        (f"time at {tflops:.3g} TFLOP/s", f"{costs.seconds:,.3g} s without rewards and decoding"),
        ("whole run", f"{settings.epochs:,} epochs, {hours:,.3g} h without these and evaluations"),
    ):
        listing.add_row(name, text)
    console.print(listing)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="run, checkpoint, or folder or file of a LoRA")],
    output: Annotated[Path, typer.Argument(help="folder to write to")],
    merge: Annotated[bool, typer.Option("--merge", help="write the whole pipeline with the adapter merged in")] = False,
    pipeline: Annotated[str | None, typer.Option(help="of --merge; the run's own by default")] = None,
    weights: Annotated[str, typer.Option(help="ema (as evaluated) or default (as trained)")] = "ema",
) -> None:
    """Write a LoRA that diffusers loads, or a whole pipeline."""
    quieten_libraries()
    from .checkpoint import CheckpointError
    from .export import export_lora, export_pipeline
    from .settings import read_settings, saved_settings
    from .weights import find_weights

    with failing(CheckpointError, OSError, ValueError):
        if weights not in ("ema", "default"):
            raise ValueError(f"weights: got {weights!r}, accepted are ema and default")
        if pipeline is not None and not merge:
            raise ValueError(f"pipeline: got {pipeline!r} without --merge, accepted is none: a LoRA is for any")
        if not merge:
            export_lora(source, output, weights=weights)
        else:
            saved = saved_settings(source)
            own = read_settings(saved) if saved else {}
            pipeline = pipeline or own.get("pipeline")
            if not isinstance(pipeline, str):
                # A source that is none says nothing at all.
                find_weights(source, weights)
                raise ValueError(f"pipeline: got none, and {source} is no part of a run that says; give --pipeline")
            half = own.get("dtype") == "bfloat16"
            export_pipeline(source, output, pipeline, weights=weights, half=half)
    say(f"exported: {output}")
    # What diffusers does unless it is told otherwise.
    say(
        "It was trained to be drawn without guidance: guidance_scale=1 of Stable Diffusion 3, true_cfg_scale=1 of "
        "Qwen; FLUX.1-dev keeps its distilled guidance_scale=3.5"
    )


@app.command()
def compare(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value settings of all methods that read them")
    ] = None,
    suite: Annotated[str, typer.Option(help="what is compared: shapes")] = "shapes",
    objectives: Annotated[str | None, typer.Option(help="names with commas between them; all by default")] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="the first method against changes to it")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="about ten minutes on two cores")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, max=1000, help="runs of each method; 5, or 2 of --quick")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.001, help="of training per run")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="of every run")] = None,
    target: Annotated[float | None, typer.Option(help="score whose cost is compared; halfway by default")] = None,
    stop_at_target: Annotated[bool, typer.Option("--stop-at-target", help="end runs that have reached it")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="first choose each method's learning rate")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="runs at once, each with its share of the cores")] = 1,
    output: Annotated[Path | None, typer.Option(help="folder; comparisons/SUITE by default")] = None,
) -> None:
    """Train by several objectives, or by changes to one, and compare; goes on where it was interrupted."""
    quieten_libraries()
    from nft_kernels.check import KernelMismatchError

    from .alarms import AlarmError
    from .checkpoint import CheckpointError
    from .compare import compare as run
    from .rewards.base import RewardError

    errors = (AlarmError, CheckpointError, KernelMismatchError, RewardError, OSError, ValueError, TypeError)
    with failing(*errors), console.status("") as status:
        page = run(
            suite,
            output or Path("comparisons") / suite,
            objectives=None if objectives is None else objectives.split(","),
            ablations=ablations,
            quick=quick,
            seeds=seeds,
            minutes=minutes,
            epochs=epochs,
            target=target,
            stop_at_target=stop_at_target,
            tune=tune,
            jobs=jobs,
            overrides=overrides or [],
            on_run=lambda done, total: status.update(f"{done} of {total} runs are done"),
        )
    say(f"comparison: {page}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    output: Annotated[
        Path | None, typer.Option(help="page of the comparison; comparison.html of several runs by default")
    ] = None,
) -> None:
    """Write a run's report anew, or compare runs on one page."""
    from .files import check_folder
    from .report import write_comparison, write_report

    with failing(OSError, ValueError):
        if output is not None:
            if output.suffix != ".html" or output.is_dir():
                raise ValueError(f"output: got {str(output)!r}, accepted is a file's name that ends with .html")
            check_folder(output.parent)
        if len(runs) == 1 and output is None:
            page = write_report(runs[0])
        else:
            page = write_comparison(runs, output or Path("comparison.html"))
    say(f"report: {page}")


@app.command()
def pretrain(
    output: Annotated[Path, typer.Argument(help="folder to write the pipeline to")],
    seed: int = 0,
    flow_steps: Annotated[int, typer.Option(help="steps on true captions")] = 8000,
    wrong_steps: Annotated[int, typer.Option(help="steps on partly wrong captions")] = 300,
    wrong_share: Annotated[float, typer.Option(help="share of pictures with another picture's caption")] = 0.65,
) -> None:
    """Make the base policy of the shapes world."""
    from .worlds.shapes.pretrain import pretrain as run

    with failing(OSError, ValueError):
        run(output, seed=seed, flow_steps=flow_steps, wrong_steps=wrong_steps, wrong_share=wrong_share)


@app.command()
def solvers(plugins: Annotated[list[str] | None, typer.Argument(help="modules that register more")] = None) -> None:
    """List the solvers that rollouts can use."""
    from nft_kernels.solvers import SOLVERS, schedule, table

    from .plugins import load_all

    with failing(ValueError):
        load_all(plugins or [])
    listing = catalog("name", "order", "evaluations per step", "stochastic", "source")
    for name, build in SOLVERS.items():
        source = (build.__doc__ or "").partition("\n")[0]
        try:
            solver = table(name, schedule(4))
            row = (str(solver.order), str(solver.evaluations), "yes" if solver.stochastic else "no", source)
        # Of a user's own, such as one whose options have no defaults.
        except Exception as error:
            row = ("", "", "", f"{source} (not by itself: {error})")
        listing.add_row(*map(escape, (name, *row)))
    console.print(listing)


if __name__ == "__main__":
    app()
