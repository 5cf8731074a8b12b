"""Checkpoints: folders that are whole or not there, with checksums, of which the newest and the best are kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is damaged."""


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Have a file or folder on the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file that is, at any moment, the old one or the new one."""
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(text)
    _flush(fresh)
    fresh.replace(path)


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
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        checksums = {path.relative_to(fresh).as_posix(): checksum(path) for path in files}
        (fresh / MANIFEST).write_text(json.dumps({**about, "sha256": checksums}, indent=1))
        for path in (fresh, *fresh.rglob("*")):
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        _flush(folder.parent)
    # The libraries that write tensors wrap a full disk in errors of their own, without a common class.
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint: {folder} could not be written: {error}; the earlier checkpoints are as they were, so make "
            "room and go on with --resume"
        ) from error


def manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, without looking at its files."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {folder} has no readable {MANIFEST}: {error}") from None


def amend(folder: Path, **about: Any) -> None:
    """Change what a checkpoint's manifest says, such as its score once it is known."""
    replace_text(folder / MANIFEST, json.dumps({**manifest(folder), **about}, indent=1))


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are what they were.

    Raises:
        CheckpointError: naming the file that is missing or has changed.
    """
    about = manifest(folder)
    for name, expected in about["sha256"].items():
        path = folder / name
        if not path.is_file() or checksum(path) != expected:
            problem = "has another checksum than when it was written" if path.is_file() else "is missing"
            raise CheckpointError(f"checkpoint: {path} {problem}; delete {folder} to go on from the one before it")
    return about


def existing(parent: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in parent.glob("epoch-*") if (path / MANIFEST).is_file())


def best(parent: Path) -> Path | None:
    """The checkpoint with the highest held-out score of the newest one's stage, the earlier one of equals."""
    found = [(manifest(path), path) for path in existing(parent)]
    scored = [(a["score"], -a["epoch"], path) for a, path in found if a["score"] is not None]
    scored = [entry for entry in scored if manifest(entry[2])["stage"] == found[-1][0]["stage"]]
    return max(scored)[2] if scored else None


def prune(parent: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest and the best, and what an interrupted process left half done."""
    top = best(parent)
    for path in existing(parent)[:-keep]:
        if path != top:
            # Out of sight first: a folder that is half deleted must not look like a checkpoint.
            path.rename(path.with_name(f".{path.name}.tmp"))
    for leftover in parent.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def link(name: Path, target: Path) -> None:
    """Point the symbolic link ``name`` at a checkpoint beside it, in one step."""
    if name.is_dir() and not name.is_symlink():
        # A run that was copied without its links has the checkpoint once more.
        shutil.rmtree(name)
    fresh = name.with_name(f".{name.name}.tmp")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(target, name.parent), target_is_directory=True)
    fresh.replace(name)
