"""Prompts in GenEval's metadata format (Ghosh et al., arXiv 2310.11513), generated from a seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ..rewards.geneval import POSITIONS, check_entry
from .text import parse_json, read_lines

CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""The 80 COCO classes under GenEval's names, in COCO's order: a detector's label index is the position here."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {2: "two", 3: "three", 4: "four"}
GROUPS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Their name already says a colour, or they come in any.
_NO_COLOR = {"person", "orange"}
_COLORED = tuple(name for name in CLASSES if name not in _NO_COLOR)
_PAIRS = len(CLASSES) * (len(CLASSES) - 1)
_SIZES = {
    "single_object": len(CLASSES),
    "two_object": _PAIRS,
    "counting": len(CLASSES) * len(COUNTS),
    "colors": len(_COLORED) * len(COLORS),
    "position": _PAIRS * len(POSITIONS),
    "color_attr": len(_COLORED) * (len(_COLORED) - 1) * len(COLORS) * (len(COLORS) - 1),
}
_PLURALS = {"person": "people", "knife": "knives", "scissors": "scissors", "skis": "skis", "sheep": "sheep"}


def plural(name: str) -> str:
    """More than one of an object, in English."""
    if name in _PLURALS:
        return _PLURALS[name]
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")


def _a(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _entry(tag: str, rng: random.Random) -> dict[str, Any]:
    def include(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
        return {"class": name, "count": count, **more}

    first, second = rng.sample(_COLORED if tag in ("colors", "color_attr") else CLASSES, 2)
    if tag == "single_object":
        return {"tag": tag, "include": [include(first)], "prompt": f"a photo of {_a(first)}"}
    if tag == "two_object":
        prompt = f"a photo of {_a(first)} and {_a(second)}"
        return {"tag": tag, "include": [include(first), include(second)], "prompt": prompt}
    if tag == "counting":
        count = rng.choice(list(COUNTS))
        return {
            "tag": tag,
            "include": [include(first, count)],
            "exclude": [include(first, count + 1)],
            "prompt": f"a photo of {COUNTS[count]} {plural(first)}",
        }
    if tag == "colors":
        color = rng.choice(COLORS)
        prompt = f"a photo of {_a(f'{color} {first}')}"
        return {"tag": tag, "include": [include(first, color=color)], "prompt": prompt}
    if tag == "position":
        where = rng.choice(POSITIONS)
        prompt = f"a photo of {_a(first)} {where} {_a(second)}"
        return {"tag": tag, "include": [include(second), include(first, position=[where, 0])], "prompt": prompt}
    one, two = rng.sample(COLORS, 2)
    prompt = f"a photo of {_a(f'{one} {first}')} and {_a(f'{two} {second}')}"
    return {"tag": tag, "include": [include(first, color=one), include(second, color=two)], "prompt": prompt}


def generate(per_group: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """``per_group`` different prompts of each of the six task groups, fewer where a group has fewer.

    Args:
        per_group: how many prompts of a group.
        seed: the same seed gives the same prompts.

    Returns:
        entries by task group with ``tag``, ``include``, ``prompt`` and, for counting, ``exclude``.
    """
    rng = random.Random(seed)
    groups = {}
    for tag in GROUPS:
        found: dict[str, dict[str, Any]] = {}
        while len(found) < min(per_group, _SIZES[tag]):
            entry = _entry(tag, rng)
            found.setdefault(entry["prompt"], entry)
        groups[tag] = list(found.values())
    return groups


def _check(entry: Any) -> None:
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(prompt, str) or not prompt.strip() or entry.get("tag") not in GROUPS:
        raise ValueError(f"accepted is an object with a prompt and one of the tags {', '.join(GROUPS)}")
    check_entry(entry, CLASSES, COLORS)


def read(path: Path) -> list[dict[str, Any]]:
    """The benchmark's own prompts, such as its ``evaluation_metadata.jsonl``: one JSON object per line.

    Raises:
        OSError: no such file.
        ValueError: a file that is not UTF-8, or a line that is not a GenEval entry, by number.
    """
    entries = []
    for number, line in read_lines(Path(path), "prompts"):
        try:
            entry = parse_json(line)
            _check(entry)
        except ValueError as error:
            raise ValueError(f"prompts: {path}, line {number}: {error}") from None
        entries.append(entry)
    if not entries:
        raise ValueError(f"prompts: {path}: got no prompts, accepted is one JSON object per line")
    return entries
