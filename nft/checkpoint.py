"""Checkpoints: folders that are whole or not there, with checksums, of which the newest and the best are kept; and how
any file of a run is written, whole or not at all, and read, with a word about what is damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from .data.text import parse_json

MANIFEST = "manifest.json"
# What is read of a manifest.
_ABOUT = {"epoch": int, "stage": int, "score": float | int | None, "sha256": dict, "surroundings": dict,
          "held_out": dict, "pipeline": str | None}  # fmt: skip
# What is logged beside numbers, and what is in it.
_LISTS = {"alarms": str, "r_histogram": int}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that is damaged."""


@contextmanager
def reading(path: Path, key: str) -> Iterator[None]:
    """Name a file that cannot be made sense of, whatever the library that reads it raises; ``key`` is what it is for.

    Raises:
        OSError: as it comes, which names the file.
        ValueError: anything else.
    """
    try:
        yield
    except OSError:
        raise
    # Of the libraries that read tensors some have errors of their own, without a common class.
    except Exception as error:
        raise ValueError(f"{key}: {path} is damaged: {error!r}") from None


def read_metrics(folder: Path, *, required: bool = True) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. A last one that a killed process had not finished to write does not count.

    Raises:
        FileNotFoundError: none, where they are ``required``.
        ValueError: a line that no trainer has logged, by number.
    """
    path, found = folder / "metrics.jsonl", []
    # Bytes that are no text are no JSON either.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            values = parse_json(line)
        except ValueError:
            if not line.endswith("\n"):
                break
            values = None
        known = isinstance(values, dict) and all(
            isinstance(value, list) and all(isinstance(item, _LISTS[key]) for item in value)
            if key in _LISTS
            else isinstance(value, int | float)
            for key, value in values.items()
        )
        if not known or not all(isinstance(values.get(key), int) for key in ("epoch", "step")):
            accepted = f"JSON of numbers and of the lists {', '.join(_LISTS)}, with epoch and step"
            raise ValueError(f"metrics: {path}, line {number}: got {line[:40]!r}, accepted is {accepted}")
        found.append(values)
    if required and not found:
        raise FileNotFoundError(f"metrics: {folder} holds no metrics.jsonl with an epoch in it")
    return found


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


def check_folder(output: Path) -> None:
    """Whether a folder can be written to, or made.

    Raises:
        FileExistsError: it is a file, or lies in one, or in a checkpoint, which is deleted as a whole.
        OSError: it cannot be written to, or made, or its name is too long.
    """
    there = next(folder for folder in (output, *output.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        within = "" if there == output else f" lies in {there}, which"
        raise FileExistsError(f"output: {output}{within} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output: {output} cannot be written to; give another folder")
    # Others have a file of the manifest's name, too.
    around = (folder for folder in (output, *output.absolute().parents) if (folder / "state.pt").is_file())
    try:
        kept = next((folder for folder in around if (folder / MANIFEST).is_file()), None)
    except OSError as error:
        raise OSError(f"output: {output} cannot be made: {error.strerror}") from None
    if kept is not None:
        raise FileExistsError(f"output: {output} lies in the checkpoint {kept}; give another folder")


def check_vacant(output: Path, names: Iterable[str] | None = None) -> None:
    """Whether nothing of a folder would be overwritten, of these names or at all.

    Raises:
        FileExistsError: something that is there.
    """
    present = sorted(os.listdir(output)) if output.is_dir() else []
    if taken := [name for name in present if names is None or name in names]:
        raise FileExistsError(f"output: {output} holds {taken[0]} already; give another folder")


# By process and folder, and only here: a process loses a lock as soon as it closes any file of that name.
_LOCKS: dict[tuple[int, Path], IO[str]] = {}


def lock(folder: Path) -> None:
    """Keep other processes out of a folder until ``unlock``.

    Raises:
        FileExistsError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = os.getpid(), folder.resolve()
    path = key[1] / ".lock"
    if key in _LOCKS:
        if path.exists() and os.path.samestat(path.stat(), os.fstat(_LOCKS[key].fileno())):
            return
        # The folder is another one, made anew.
        unlock(folder)
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FileExistsError(f"output: another process trains in {folder}; give another folder") from None
    _LOCKS[key] = file


def unlock(folder: Path) -> None:
    """Let other processes into a folder that this one may have locked."""
    if file := _LOCKS.pop((os.getpid(), folder.resolve()), None):
        file.close()


def beside(path: Path) -> Path:
    """A name for what is not finished, which no other process takes, in a folder that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid4().hex}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is, at any moment, the old one or the new one.

    Raises:
        OSError: it cannot be written, as on a full disk, and is the old one.
    """
    fresh = beside(path)
    try:
        fresh.write_text(text, encoding="utf-8")
        _flush(fresh)
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from None


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
        files = sorted(path for path in fresh.rglob("*") if path.is_file())
        checksums = {path.relative_to(fresh).as_posix(): checksum(path) for path in files}
        (fresh / MANIFEST).write_text(_manifest_text({**about, "sha256": checksums}))
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
    replace_text(folder / MANIFEST, _manifest_text({**manifest(folder), **about}))


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
            raise CheckpointError(f"checkpoint: {path} {problem}; {_remedy(folder)}")
    return about


def existing(parent: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One without its manifest is damaged; a copy of another name is none."""
    numbered = (path for path in parent.glob("epoch-*") if path.name.removeprefix("epoch-").isdecimal())
    return sorted((path for path in numbered if path.is_dir()), key=_epoch)


def _epoch(path: Path) -> int:
    return int(path.name.removeprefix("epoch-"))


def best(parent: Path) -> Path | None:
    """The checkpoint with the highest held-out score of the newest one's stage, the earlier one of equals; of those
    that can be read."""
    found = []
    for path in existing(parent):
        # A damaged one is named where it is needed, as the newest is before this.
        with suppress(CheckpointError):
            found.append((manifest(path), path))
    scored = [
        (about["score"], -about["epoch"], path)
        for about, path in found
        if about["stage"] == found[-1][0]["stage"] and about["score"] is not None and math.isfinite(about["score"])
    ]
    return max(scored)[2] if scored else None


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
