"""How any file of a run is written, whole or not at all, and read, with a word about what is damaged; and whether a
folder can be written to, by this process alone."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from .data.text import parse_json

if TYPE_CHECKING:
    from torch import Tensor

# What a checkpoint says about itself.
MANIFEST = "manifest.json"
# What is logged beside numbers, and what is in it.
_LISTS = {"alarms": str, "r_histogram": int}


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


def flush(path: Path) -> None:
    """Have a file or folder on the disk: a rename must not overtake what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def give_usual_mode(path: Path) -> None:
    """Let the umask say who may read a file: safetensors 0.8 writes them for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    # Not every file system has modes.
    with suppress(OSError):
        path.chmod(0o666 & ~umask)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint; others have a file of the manifest's name, too."""
    return (folder / "state.pt").is_file() and (folder / MANIFEST).is_file()


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
    try:
        # To root all permissions look granted, even where nothing can be made, as in /proc.
        TemporaryFile(dir=there).close()
    except OSError as error:
        raise PermissionError(f"output: {output} cannot be written to: {error.strerror}; give another folder") from None
    try:
        kept = next((folder for folder in (output, *output.absolute().parents) if is_checkpoint(folder)), None)
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


def forget_unfinished(path: Path) -> None:
    """Delete what killed processes left ``beside`` a file that only this one writes."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of a file that is, at any moment, the old one or the new one.

    Raises:
        OSError: it cannot be written, as on a full disk, and is the old one.
    """
    fresh = beside(path)
    try:
        yield fresh
        fresh.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from None
    finally:
        # Most often it is in its place; and a file system that is not to be written to refuses this, too.
        with suppress(OSError):
            fresh.unlink()


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a uint8 picture (H, W, 3) as PNG.

    Raises:
        OSError: as ``replacing``.
    """
    from PIL import Image

    with replacing(path) as fresh:
        Image.fromarray(picture.numpy()).save(fresh, format="PNG")


def replace_text(path: Path, text: str) -> None:
    """Write a file that is, at any moment, the old one or the new one, also where the power fails.

    Raises:
        OSError: as ``replacing``.
    """
    with replacing(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
        flush(fresh)
