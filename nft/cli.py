"""Command line: ``nft train``, ``nft sample``, ``nft pretrain``, ``nft solvers``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .evaluate_cli import evaluate
from .rewards.cli import reward_server, rewards

app = typer.Typer(help="DiffusionNFT: online reinforcement learning on the forward process.", no_args_is_help=True)
_console = Console()
app.command("eval")(evaluate)
app.command()(rewards)
app.command()(reward_server)


def _quieten_libraries() -> None:
    """Keep the libraries' loading bars and hints about parts we do not use out of the run's own output."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")


def _fail(error: Exception) -> typer.Exit:
    _console.print(f"[red]error:[/red] {error}", highlight=False)
    return typer.Exit(2)


@app.command()
def train(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value settings, such as epochs=20")] = None,
    config: Annotated[str, typer.Option(help="bundled configuration or YAML file")] = "shapes",
    output: Annotated[Path | None, typer.Option(help="folder of the run; runs/CONFIG by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the folder's checkpoint")] = False,
    verify_kernels: Annotated[bool, typer.Option(help="compare the loss with the reference in the first steps")] = True,
) -> None:
    """Fine-tune a pipeline with DiffusionNFT."""
    from .config import ConfigError, load_config

    extra = [] if verify_kernels else ["verify_kernels_steps=0"]
    try:
        settings = load_config(config, [*(overrides or []), *extra])
    except ConfigError as error:
        raise _fail(error) from None
    folder = output or Path("runs") / Path(config).stem
    _quieten_libraries()
    from nft_kernels.check import KernelMismatchError

    from .report import save_grid, write_report
    from .trainer import Trainer

    try:
        trainer = Trainer(settings, folder, resume=resume)
    except (FileExistsError, FileNotFoundError, ValueError, TypeError) as error:
        raise _fail(error) from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    seen: dict[str, float] = {}
    with Progress(*columns, console=_console) as progress:
        bar = progress.add_task("evaluating", total=settings.epochs, completed=trainer.epoch)

        def on_epoch(metrics: dict[str, float]) -> None:
            seen.update(metrics)
            text = ", ".join(f"{k} {seen[k]:.3f}" for k in ("reward", "loss", "eval_strict") if k in seen)
            progress.update(bar, completed=trainer.epoch, description=text)
            if "eval_strict" in metrics:
                progress.print(f"epoch {trainer.epoch}: held-out strict score {metrics['eval_strict']:.3f}")

        try:
            trainer.train(
                on_epoch,
                lambda epoch, x, names: save_grid(x, names, folder / ("after.png" if epoch else "before.png")),
            )
        except KeyboardInterrupt:
            progress.stop()
            again = " ".join(["nft train", f"--config {config}", f"--output {folder} --resume", *(overrides or [])])
            saved = f"epoch {trainer.epoch} is saved; go on with\n  {again}"
            _console.print(f"stopped: {saved if trainer.epoch else 'no epoch was finished'}")
            raise typer.Exit(130) from None
        except KernelMismatchError as error:
            progress.stop()
            raise _fail(error) from None
    _console.print(f"report: {write_report(folder)}")


@app.command()
def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts, each of which is drawn")] = None,
    file: Annotated[Path | None, typer.Option(help="text file with one prompt per line")] = None,
    config: Annotated[str, typer.Option(help="bundled configuration or YAML file")] = "shapes",
    override: Annotated[list[str] | None, typer.Option("--set", help="key=value setting, such as device=cuda")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="run, checkpoint or LoRA folder; none is the base")] = None,
    solver: Annotated[str, typer.Option(help="see `nft solvers`")] = "dpm++2M",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float | None, typer.Option(min=0, help="scale of classifier-free guidance")] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="pictures per prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the first picture of every prompt")] = 0,
    output: Annotated[Path, typer.Option(help="folder for the pictures and grid.png")] = Path("samples"),
) -> None:
    """Draw pictures of prompts."""
    import json

    from .config import ConfigError, load_config

    lines = [*(prompts or [])]
    try:
        if file is not None:
            lines += [line.strip() for line in file.read_text().splitlines() if line.strip()]
        if not lines:
            raise ValueError("prompts: got none, accepted are arguments or a --file with one prompt per line")
        settings = load_config(config, override)
        _quieten_libraries()
        from .policy import Policy

        adapter = None if checkpoint is None else Policy.find_adapter(checkpoint)
        if adapter is not None:
            lora = json.loads((adapter / "adapter_config.json").read_text())
            settings = settings.model_copy(update={"lora_rank": lora["r"], "lora_alpha": lora["lora_alpha"]})
        from nft_kernels.solvers import schedule, table

        table(solver, schedule(steps))
        policy = Policy(settings)
    except (ConfigError, OSError, ValueError) as error:
        raise _fail(error) from None
    from PIL import Image

    from .report import save_grid
    from .rollout import rollout, times

    if adapter is not None:
        policy.load_adapter("default", adapter)
    entries = [line for line in lines for _ in range(per_prompt)]
    seeds = [seed + i for _ in lines for i in range(per_prompt)]
    grid = times(steps, policy.pipeline.scheduler.config.shift)
    with _console.status(f"drawing {len(entries)} pictures"), policy.merged("default"):
        pictures = policy.decode(
            rollout(policy, entries, seeds, grid, solver, settings.rollout_batch, guidance=guidance)
        ).cpu()
    output.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.numpy()).save(output / f"{i:04d}_seed{seeds[i]}.png")
    save_grid(pictures, entries, output / "grid.png")
    _console.print(f"{len(entries)} pictures: {output}")


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

    try:
        run(output, seed=seed, flow_steps=flow_steps, wrong_steps=wrong_steps, wrong_share=wrong_share)
    except ValueError as error:
        raise _fail(error) from None


@app.command()
def solvers() -> None:
    """List the solvers that rollouts can use."""
    from rich.table import Table

    from nft_kernels.solvers import SOLVERS, schedule, table

    listing = Table("name", "order", "evaluations per step", "stochastic", "source")
    for name, build in SOLVERS.items():
        solver = table(name, schedule(4))
        source = (build.__doc__ or "").partition("\n")[0]
        listing.add_row(name, str(solver.order), str(solver.evaluations), "yes" if solver.stochastic else "no", source)
    _console.print(listing)


if __name__ == "__main__":
    app()
