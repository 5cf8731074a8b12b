"""Prompt sets by name or file, each with a side to train on and one that is held out."""

from __future__ import annotations

import json
import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from nft.worlds.shapes import prompts as shapes

from . import geneval, ocr, preference
from .text import encodable, parse_json, read_lines

Entry = dict[str, Any]
SETS = ("shapes", "geneval", "ocr", "preference")
_PER_GROUP = 5000
_TRAIN_SEED, _HELD_OUT_SEED = 1, 2
# Those that are generated as one list, and not by task group.
_LISTS = ("ocr", "preference")
_HELD_OUT = {"geneval": 100, "ocr": 1000, "preference": 100}
_BENCHMARK = {"geneval": 80, "ocr": 1000, "preference": 50}
_BENCHMARK_SEEDS = {"geneval": 2509, "ocr": 16117, "preference": 2205}
# With eval_ before them they are no task group's.
_TAKEN = re.compile(r"strict|reward_.*|.*_std")
_MIRRORED = {"right of": "left of", "below": "above"}


def read(path: Path, key: str = "prompts") -> list[Entry]:
    """Entries of a text file with a prompt per line, or of a JSON-lines file with an object with ``prompt`` per line.

    Args:
        path: the file.
        key: what messages call it.

    Raises:
        OSError: no such file.
        ValueError: another ending or encoding, no prompts, or a line that is not an object with a prompt, by number.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{key}: got {str(path)!r}, accepted are {', '.join(SETS)} or a .txt or .jsonl file")
    if not path.is_file():
        raise FileNotFoundError(f"{key}: got {str(path)!r}, but there is no such file; bring one prompt per line")
    lines = read_lines(path, key)
    if not lines:
        raise ValueError(f"{key}: {path} is empty, accepted is at least one prompt")
    entries = []
    for number, line in lines:
        try:
            values = {"prompt": line.strip()} if path.suffix == ".txt" else parse_json(line)
            if not isinstance(values, dict):
                raise ValueError(f"got {line[:40]!r}, accepted is an object with a prompt")
            entry = {"tag": path.stem, **values}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {path}, line {number}: {error}") from None
        for part in ("prompt", "tag"):
            text = entry.get(part)
            if not isinstance(text, str) or not text.strip() or not encodable(text):
                raise ValueError(f"{key}: {path}, line {number}: got {part} {text!r}, accepted is a text")
        if _TAKEN.fullmatch(entry["tag"]):
            accepted = "is any other, as scores of all have that name in metrics.jsonl; of a .txt file it is its name"
            raise ValueError(f"{key}: {path}, line {number}: got tag {entry['tag']!r}, accepted {accepted}")
        entries.append(entry)
    return entries


def _generate(source: str, count: int, seed: int, *quarters: int) -> list[Entry]:
    """One of ``_LISTS``, of ``ocr`` with these quarters' texts: in another place a text is no other."""
    return ocr.generate(count, seed, quarters) if source == "ocr" else preference.generate(count, seed)


def held_out(source: str, per_group: int | None = None) -> list[Entry]:
    """A fixed set that is never trained on: ``per_group`` prompts of every task group, or all; of ``geneval`` and
    ``ocr`` nothing that ``benchmark`` asks for.

    Of ``geneval`` the 80 single objects are trained on and never held out.

    Args:
        source: ``shapes``, ``geneval``, ``ocr``, ``preference``, or a file.
        per_group: most prompts with one tag.

    Raises:
        OSError, ValueError: a file that cannot be read (see ``read``), or a ``per_group`` that is not positive.
    """
    if per_group is not None and per_group < 1:
        raise ValueError(f"per_group: got {per_group}, accepted are positive numbers")
    if source == "shapes":
        return shapes.sample(held_out=True, per_group=per_group or 40)
    if source == "geneval":
        # All single objects are among these.
        tested = {_asked(entry) for entry in benchmark("geneval")}
        groups = geneval.generate(_HELD_OUT["geneval"], _HELD_OUT_SEED).values()
        entries = [entry for group in groups for entry in group if _asked(entry) not in tested]
    elif source in _LISTS:
        entries = _generate(source, _HELD_OUT[source], _HELD_OUT_SEED, 2)
    else:
        entries = read(Path(source), "held_out_prompts")
    return first(entries, per_group)


def first(entries: list[Entry], per_group: int | None) -> list[Entry]:
    """The first ``per_group`` entries of every task group, or all."""
    return [entry for group in _by_tag(entries) for entry in group[:per_group]]


def benchmark(source: str) -> list[Entry]:
    """The prompts that checkpoints are compared on: of ``geneval`` 80 of each task group, of ``ocr`` 1000, of
    ``preference`` 50 of each kind."""
    count, seed = _BENCHMARK[source], _BENCHMARK_SEEDS[source]
    if source in _LISTS:
        return _generate(source, count, seed, 3)
    return [entry for group in geneval.generate(count, seed).values() for entry in group]


def _asked(entry: Entry) -> str:
    """What a prompt of GenEval asks for, in whatever order it names the objects; any other prompt."""
    include = entry.get("include", ())
    match include:
        # Who is right of another has it on the left.
        case [{"class": _} as other, {"position": [str(where), 0], **placed}] if where in _MIRRORED:
            include = [placed, other | {"position": [_MIRRORED[where], 0]}]
    objects = sorted(json.dumps(item, sort_keys=True) for item in include)
    return " ".join(objects) or entry["prompt"]


def train(source: str, apart_from: list[Entry]) -> list[list[Entry]]:
    """Training prompts by task group, without those of ``apart_from``, and of a generated set without those of
    ``benchmark``: but of ``geneval`` for the 80 single objects, which are all there are.

    Args:
        source: ``shapes``, ``geneval``, ``ocr``, ``preference``, or a file.
        apart_from: held-out entries.

    Raises:
        OSError, ValueError: a file that cannot be read, or a source with no other prompts.
    """
    kept_away = {entry["prompt"] for entry in apart_from}
    if source == "shapes":
        groups = list(shapes.split(held_out=False).values())
    elif source in _LISTS:
        groups = _by_tag(_generate(source, _PER_GROUP, _TRAIN_SEED, 0, 1))
        kept_away |= {entry["prompt"] for entry in benchmark(source)}
    elif source == "geneval":
        asked = {_asked(entry) for entry in (*apart_from, *benchmark("geneval")) if entry["tag"] != "single_object"}
        generated = geneval.generate(_PER_GROUP, _TRAIN_SEED).values()
        groups = [[entry for entry in group if _asked(entry) not in asked] for group in generated]
    else:
        groups = _by_tag(read(Path(source)))
    left = [[entry for entry in group if entry["prompt"] not in kept_away] for group in groups]
    if not any(left):
        raise ValueError(f"prompts: {source} holds no prompt that is not held out")
    return [group for group in left if group]


@lru_cache(maxsize=16)
def _order(size: int, seed: str) -> list[int]:
    return random.Random(seed).sample(range(size), size)


def in_turn(groups: list[list[Entry]], first: int, count: int, seed: int) -> list[Entry]:
    """``count`` entries from number ``first`` on of an endless sequence in which the groups take turns, and in a group
    each entry comes once before any comes again, in an order that is another every time."""
    found = []
    for number in range(first, first + count):
        turn, which = divmod(number, len(groups))
        group = groups[which]
        again, place = divmod(turn, len(group))
        found.append(group[_order(len(group), f"{seed} {which} {again}")[place]])
    return found


def _by_tag(entries: list[Entry]) -> list[list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry["tag"], []).append(entry)
    return list(groups.values())
