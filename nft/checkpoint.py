"""Checkpoints: folders that are whole or not there, with checksums, of which the newest and the best are kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import files
from .data.text import parse_json
from .files import MANIFEST

# What is read of a manifest.
_ABOUT = {"epoch": int, "stage": int, "score": float | int | None, "sha256": dict, "surroundings": dict,
          "held_out": dict, "pipeline": str | None}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is damaged."""


def _seal(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _manifest_text(about: dict[str, Any]) -> str:
    return json.dumps({**about, "seal": _seal(about)}, indent=1)


def write(folder: Path, fill: Callable[[Path], None], about: dict[str, Any]) -> None:
    """Write a checkpoint beside its place, then put it there in one step.

    Args:
        folder: where it shall be.
        fill: writes its files below the folder that it is given.
        about: what the manifest says beside the files' checksums, such as epoch and score.

    Raises:
        CheckpointError: it cannot be written, as on a full disk. Earlier checkpoints are as they were.
    """
    fresh = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        fill(fresh)
        written = sorted(path for path in fresh.rglob("*") if path.is_file())
        for path in written:
            files.give_usual_mode(path)
        checksums = {path.relative_to(fresh).as_posix(): files.checksum(path) for path in written}
        (fresh / MANIFEST).write_text(_manifest_text({**about, "sha256": checksums}))
        for path in (fresh, *fresh.rglob("*")):
            files.flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        files.flush(folder.parent)
    # The libraries that write tensors wrap a full disk in errors of their own, without a common class.
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint: {folder} could not be written: {error}; the earlier checkpoints are as they were, so make "
            "room and go on with --resume"
        ) from error


def _remedy(folder: Path) -> str:
    return f"delete {folder} to go on from the one before it, or from the start"


def manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, without looking at its files.

    Raises:
        CheckpointError: it says nothing that can be used.
    """
    try:
        about = dict(parse_json((folder / MANIFEST).read_text()))
        if about.pop("seal") != _seal(about):
            raise ValueError("it has another checksum than when it was written")
        # What is not known at first, or by who writes it.
        about = {"surroundings": {}, "held_out": {}, "pipeline": None, **about}
        if not all(isinstance(about[key], kind) for key, kind in _ABOUT.items()):
            raise ValueError(f"accepted are {', '.join(_ABOUT)}")
        if folder.name.startswith("epoch-") and about["epoch"] != _epoch(folder):
            raise ValueError(f"it is of epoch {about['epoch']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint: {folder} has no readable {MANIFEST}: {error!r}; {_remedy(folder)}"
        ) from None
    return about


def amend(folder: Path, **about: Any) -> None:
    """Change what a checkpoint's manifest says, such as its score once it is known."""
    files.replace_text(folder / MANIFEST, _manifest_text({**manifest(folder), **about}))


def verify(folder: Path, part: str = "") -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what they were; looks at those whose names begin with ``part``.

    Raises:
        CheckpointError: naming the file that is missing or has changed.
    """
    about = manifest(folder)
    for name, expected in about["sha256"].items():
        path = folder / name
        if name.startswith(part) and (not path.is_file() or files.checksum(path) != expected):
            problem = "has another checksum than when it was written" if path.is_file() else "is missing"
            raise CheckpointError(f"checkpoint: {path} {problem}; {_remedy(folder)}")
    return about


def existing(parent: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One without its manifest is damaged; a copy of another name is none."""
    numbered = (path for path in parent.glob("epoch-*") if path.name.removeprefix("epoch-").isdecimal())
    return sorted((path for path in numbered if path.is_dir()), key=_epoch)


def _epoch(path: Path) -> int:
    return int(path.name.removeprefix("epoch-"))


def best(parent: Path) -> Path | None:
    """The checkpoint with the highest held-out score of the stage that was scored last, the earlier one of equals; of
    those that can be read."""
    scored = []
    for path in existing(parent):
        # A damaged one is named where it is needed, as the newest is before this.
        with suppress(CheckpointError):
            about = manifest(path)
            if about["score"] is not None and math.isfinite(about["score"]):
                scored.append((about["stage"], about["score"], -about["epoch"], path))
    return max(score for score in scored if score[0] == scored[-1][0])[-1] if scored else None


def prune(parent: Path, keep: int, every: int | None = None) -> Path | None:
    """Delete all but the ``keep`` newest, the best and those of every so many epochs, and what an interrupted process
    left half done. Returns the best."""
    top = best(parent)
    for path in existing(parent)[:-keep]:
        if path != top and not (every and _epoch(path) % every == 0):
            # Out of sight first: a folder that is half deleted must not look like a checkpoint.
            path.rename(path.with_name(f".{path.name}.tmp"))
    for leftover in parent.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    return top


def link(name: Path, target: Path) -> None:
    """Point the symbolic link ``name`` at a checkpoint beside it, in one step."""
    if name.is_dir() and not name.is_symlink():
        # A run that was copied without its links has the checkpoint once more.
        shutil.rmtree(name)
    fresh = name.with_name(f".{name.name}.tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, name.parent), target_is_directory=True)
    fresh.replace(name)
