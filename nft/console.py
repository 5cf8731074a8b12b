"""What the commands print, and how."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

# Names may hold what would be taken for an emoji.
console, _errors = Console(emoji=False), Console(stderr=True, emoji=False)


def say(text: str, style: str | None = None) -> None:
    """Print a line as it is, to be copied: paths may hold brackets, which the console would take for markup."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def fail(error: Exception | str) -> typer.Exit:
    """Print what was wrong with a command, and how to end it."""
    _errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def failing(*errors: type[Exception]) -> Iterator[None]:
    """End a command that raises one of these, as ``fail`` does."""
    try:
        yield
    except errors as error:
        raise fail(error) from None


def catalog(name: str, *columns: str) -> Table:
    """A table of things by name. In a narrow terminal other cells take more lines, so that all can be copied."""
    return Table(Column(name, no_wrap=True), *(Column(column, overflow="fold") for column in columns))


def bars() -> Progress:
    """Progress of something that takes long."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # By what was done in the last day: with rich's own half a minute an epoch that takes longer has no time remaining.
    return Progress(*columns, console=console, speed_estimate_period=86_400)


def quieten_libraries() -> None:
    """Keep the libraries' loading bars and hints about parts we do not use out of the run's own output."""
    # For processes that this one starts: they import the libraries before they call anything.
    os.environ.update(TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error")
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
