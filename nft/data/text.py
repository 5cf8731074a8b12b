"""Text files that users bring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_text(path: Path, key: str) -> str:
    """The text of a file, which ``key`` is about.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise type(error)(f"{key}: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{key}: {path} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_lines(path: Path, key: str) -> list[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers; other characters that end a line in Unicode do not.

    Raises:
        OSError, ValueError: see ``read_text``.
    """
    return [(number, line) for number, line in enumerate(read_text(path, key).split("\n"), start=1) if line.strip()]


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` of what others wrote.

    Raises:
        ValueError: what is no JSON, or nested too deep to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def encodable(text: str) -> bool:
    """Whether it is Unicode: half of a character's UTF-16, or a byte that was no UTF-8, is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
