"""Prompts of the shapes world with GenEval's metadata (Ghosh et al., 2023) and its six task groups."""

from __future__ import annotations

import random
from itertools import permutations, product
from typing import Any

from nft.data.geneval import COUNTS, GROUPS, POSITIONS, plural

from . import COLORS, SHAPES

HELD_OUT_SHARE = 0.25

_ONE = ("a {}", "one {}", "a picture of a {}", "a drawing of a {}")
_PAIR = ("a {} and a {}", "a picture of a {} and a {}")
_SPLIT_SEED = 2509


def _object(shape: str, color: str | None = None, count: int = 1) -> dict[str, Any]:
    return {"class": shape, "count": count} | ({"color": color} if color else {})


def _name(item: dict[str, Any]) -> str:
    noun = item["class"] if item["count"] == 1 else plural(item["class"])
    return f"{item['color']} {noun}" if "color" in item else noun


def _entry(tag: str, prompt: str, *include: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), **more, "prompt": prompt}


def _group(tag: str) -> list[dict[str, Any]]:
    """Every prompt of one task group."""
    if tag in ("single_object", "colors"):
        objects = [_object(s, c) for s in SHAPES for c in (COLORS if tag == "colors" else [None])]
        return [_entry(tag, t.format(_name(o)), o) for o in objects for t in _ONE]
    if tag == "counting":
        objects = [_object(s, c, n) for s, c, n in product(SHAPES, [None, *COLORS], COUNTS)]
        return [
            _entry(tag, f"{COUNTS[o['count']]} {_name(o)}", o,
                   exclude=[{"class": o["class"], "count": o["count"] + 1}])
            for o in objects
        ]  # fmt: skip
    plain = [(_object(a), _object(b)) for a, b in permutations(SHAPES, 2)]
    colored = [(_object(a, c), _object(b, d)) for a, b in permutations(SHAPES, 2) for c, d in permutations(COLORS, 2)]
    if tag == "two_object":
        return [_entry(tag, t.format(_name(a), _name(b)), a, b) for a, b in plain for t in _PAIR]
    if tag == "color_attr":
        return [_entry(tag, _PAIR[0].format(_name(a), _name(b)), a, b) for a, b in colored]
    return [
        _entry(tag, f"a {_name(b)} {where} a {_name(a)}", a, b | {"position": [where, 0]})
        for a, b in plain + colored
        for where in POSITIONS
    ]


def split(held_out: bool) -> dict[str, list[dict[str, Any]]]:
    """All prompts of one side of the fixed train / held-out split, by task group.

    The split does not depend on any run's seed: a prompt that is held out is held out in every run.
    """
    sides = {}
    for tag in GROUPS:
        entries = _group(tag)
        random.Random(f"{_SPLIT_SEED} {tag}").shuffle(entries)
        cut = round(len(entries) * HELD_OUT_SHARE)
        sides[tag] = entries[:cut] if held_out else entries[cut:]
    return sides


def sample(held_out: bool, per_group: int) -> list[dict[str, Any]]:
    """``per_group`` prompts of each task group, group by group, always the same; small groups repeat theirs."""
    rng = random.Random(0)
    chosen = []
    for entries in split(held_out).values():
        order = rng.sample(entries, len(entries))
        chosen += [order[i % len(order)] for i in range(per_group)]
    return chosen
