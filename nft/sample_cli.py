"""The command ``nft sample``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import bars, failing, quieten_libraries, say
from .evaluate_cli import pairs, sampling_settings

if TYPE_CHECKING:
    from torch import Tensor


def _texts(prompts: list[str], file: Path | None) -> list[str]:
    """The prompts that are given and those of a file."""
    from .config import Config
    from .data.prompts import read
    from .data.text import encodable, read_lines

    for prompt in prompts:
        # As of other commands, which take settings where this one takes prompts.
        if "=" in prompt and prompt.partition("=")[0].partition(".")[0] in Config.model_fields:
            raise ValueError(f"prompts: got {prompt!r}, accepted is a text, and settings with --override before each")
    lines = [*prompts]
    if file is not None and file.suffix == ".jsonl":
        lines += [entry["prompt"] for entry in read(file, "file")]
    elif file is not None:
        lines += [line.strip() for _, line in read_lines(file, "file")]
    for line in lines:
        if not line.strip() or not encodable(line):
            raise ValueError(f"prompts: got {line!r}, accepted is a text")
    if not lines:
        raise ValueError("prompts: got none, accepted are arguments or a --file with one prompt per line")
    return lines


def _solver_options(solver: str, steps: int, settings: list[str] | None) -> dict[str, Any]:
    """The options of a solver, which takes them and so many steps."""
    from nft_kernels.solvers import SOLVERS, schedule, table

    from .settings import parsed

    if solver not in SOLVERS:
        raise ValueError(f"solver: got {solver!r}, accepted are {', '.join(SOLVERS)}")
    options = {key: parsed(value, f"--option {key}") for key, value in pairs(settings, "--option").items()}
    try:
        table(solver, schedule(steps), **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"solver: {solver} cannot take {steps} steps with options {options}: {error}") from None
    return options


def _new_folder() -> Path:
    """``samples``, samples-2, ...: the first that is not there, made at once, as another command may draw, too."""
    i = 1
    while True:
        folder = Path(f"samples-{i}" if i > 1 else "samples")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            i += 1


def sample(
    prompts: Annotated[list[str] | None, typer.Argument(help="prompts, each of which is drawn")] = None,
    file: Annotated[Path | None, typer.Option(help="text file with one prompt per line, or .jsonl")] = None,
    config: Annotated[
        str | None, typer.Option(help="bundled configuration or YAML file; the checkpoint's own or shapes by default")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="key=value of the configuration, such as device=cuda")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="run, checkpoint or folder of weights; none is the base")
    ] = None,
    solver: Annotated[str, typer.Option(help="see `nft solvers`")] = "dpm++2M",
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    option: Annotated[list[str] | None, typer.Option(help="key=value option of the solver, such as eta=0.5")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="scale of classifier-free guidance")] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="guide against the base, not the empty prompt")
    ] = False,
    per_prompt: Annotated[int, typer.Option(min=1, max=1_000_000, help="pictures per prompt")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="of the first picture of every prompt")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="folder for the pictures and grid.png; a new samples, samples-2, ... by default")
    ] = None,
) -> None:
    """Draw pictures of prompts."""
    from .checkpoint import CheckpointError
    from .config import check_float32
    from .files import check_folder, check_vacant, save_picture

    with failing(CheckpointError, OSError, ValueError):
        check_folder(output or Path())
        if output is not None:
            check_vacant(output, {path.name for path in output.glob("*.png")})
        lines = _texts(prompts or [], file)
        if reference and (guidance is None or checkpoint is None):
            raise ValueError("reference: needs a --guidance and a --checkpoint that differs from the base")
        settings = sampling_settings(config, checkpoint, "shapes", override or [])
        quieten_libraries()
        from .full import load_policy

        options = {"guidance": guidance, "reference": reference, **_solver_options(solver, steps, option)}
        if guidance is not None:
            check_float32("guidance", guidance)
        if seed + per_prompt > 2**63:
            raise ValueError(f"seed: got {seed}, accepted are 0 to {2**63 - per_prompt} for {per_prompt} per prompt")
        policy = load_policy(settings, checkpoint, reference=reference)
    import torch

    from .report import save_grid, shown
    from .rollout import rollout

    entries = [line for line in lines for _ in range(per_prompt)]
    seeds = [seed + i for _ in lines for i in range(per_prompt)]
    grid = policy.times(steps)
    # The base's weights are needed as they are.
    weights = nullcontext() if reference else policy.merged("default")
    batch = min(settings.rollout_batch, len(entries))
    # In the order of their names they are in that of the prompts.
    digits = max(4, len(str(len(entries) - 1)))
    cells = shown(len(entries))
    kept: list[Tensor] = []
    with failing(OSError):
        if output is None:
            output = _new_folder()
        output.mkdir(parents=True, exist_ok=True)
        with bars() as progress, weights:
            bar = progress.add_task("drawing", total=len(entries))
            for start in range(0, len(entries), batch):
                part = slice(start, start + batch)
                x0 = rollout(policy, entries[part], seeds[part], grid, solver, batch, **options)
                # What is drawn is kept, whatever ends the command.
                for i, picture in enumerate(policy.decode(x0).cpu(), start):
                    save_picture(picture, output / f"{i:0{digits}d}_seed{seeds[i]}.png")
                    if i in cells:
                        # A part of its batch would keep all of it.
                        kept.append(picture.clone())
                progress.update(bar, completed=i + 1)
        save_grid(torch.stack(kept), [entries[i] for i in cells], output / "grid.png")
    say(f"{len(entries)} pictures: {output}")
