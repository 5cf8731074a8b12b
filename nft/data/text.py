"""Text files that users bring."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path, key: str) -> str:
    """The text of a file, which ``key`` is about.

    Raises:
        OSError: no such file.
        ValueError: a file that is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {path} is not UTF-8: {error.reason} at byte {error.start}") from None
