"""A user's own modules: rewards, and whatever registers itself when it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType


def load(module: str, said: str, *, registered: bool = False) -> ModuleType:
    """Import a module on the path or in the working folder; ``said`` is what messages begin with. One that an installed
    package has ``registered`` is that package's, and not a copy in the working folder.

    Raises:
        ValueError: there is none, it fails, or the folder's is hidden by another of its name.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        # What it prints is no part of what a command prints.
        with redirect_stdout(sys.stderr):
            found = import_module(module)
    # Its exit is not the command's.
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{said}, but there is no module {error.name!r} on the path or in the working folder"
            ) from None
        raise ValueError(f"{said}, but {module} fails: {type(error).__name__}: {error}") from error
    if registered:
        return found
    here, origin = Path.cwd().resolve(), getattr(found, "__file__", None) or "Python itself"
    file = here / module.replace(".", "/")
    if any(own.is_file() for own in (file.with_suffix(".py"), file / "__init__.py")):
        if not Path(origin).resolve().is_relative_to(here):
            raise ValueError(f"{said}, but {origin} comes before the working folder's module of that name; rename it")
    return found


def load_all(modules: Iterable[str]) -> None:
    """Import what a setting or an argument names ``plugins``.

    Raises:
        ValueError: as ``load``.
    """
    for module in modules:
        load(module, f"plugins: got {module!r}")
