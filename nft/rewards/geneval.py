"""GenEval's rule (Ghosh et al., arXiv 2310.11513): from detected objects to a score, as a pure function.

Two rules are in use. The benchmark's own asks for at least as many objects as the prompt names and looks at the most
confident ones (djghosh13/geneval, evaluation/evaluate_images.py). Reinforcement learning would answer that by drawing
many, so it is trained on exact counts and partial credit (yifan123/reward-server, reward_server/gen_eval.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MAX_OBJECTS = 16
POSITIONS = ("left of", "right of", "above", "below")
_POSITION_THRESHOLD = 0.1


def check_entry(entry: Mapping[str, Any], classes: Collection[str], colors: Collection[str]) -> None:
    """Whether the rules can read an entry's ``include`` and ``exclude``.

    Args:
        entry: with a list ``include`` of objects with ``class`` and ``count``, and maybe ``color`` and ``position``, a
            direction and the index of an object before it; and maybe a list ``exclude`` with ``class`` and ``count``.
        classes, colors: that can be found.

    Raises:
        ValueError: what they cannot, named.
    """

    def refuse(where: str, got: Any, accepted: str) -> None:
        raise ValueError(f"{where}: got {got!r}, accepted {accepted}")

    # Of a set or a mapping what has no hash could not be asked for.
    classes, colors = list(classes), list(colors)
    for part in ("include", "exclude"):
        items = entry.get(part, [] if part == "exclude" else None)
        if not isinstance(items, list | tuple) or (part == "include" and not items):
            refuse(part, items, f"is a list of {'at least one object' if part == 'include' else 'objects'}")
        for i, item in enumerate(items):
            where = f"{part} {i}"
            if not isinstance(item, Mapping):
                refuse(where, item, "is an object with class and count")
            if item.get("class") not in classes:
                refuse(f"{where}: class", item.get("class"), f"are {', '.join(classes[:6])} and others like them")
            if type(item.get("count")) is not int or item["count"] < 1:
                refuse(f"{where}: count", item.get("count"), "are positive integers")
            if "color" in item and item["color"] not in colors:
                refuse(f"{where}: color", item["color"], f"are {', '.join(colors)}")
            if "position" in item:
                match item["position"]:
                    # True is an int, too.
                    case [str(direction), index] if direction in POSITIONS and type(index) is int and 0 <= index < i:
                        continue
                refuse(f"{where}: position", item["position"], f"is one of {', '.join(POSITIONS)} and an index before")


@dataclass(frozen=True)
class Detection:
    """One detected object: ``box`` is (left, top, right, bottom) in pixels, y pointing down."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float = 1.0
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Result of the rules: ``correct`` and ``strict`` are 0 or 1, ``partial`` is 1 at most and falls below 0 where far
    too many objects were drawn, ``reasons`` says what the strict rule missed."""

    correct: float
    strict: float
    partial: float
    reasons: tuple[str, ...]


def counted(confidences: Sequence[float], tag: str) -> list[int]:
    """Which of a detector's objects of one class count in a prompt of task group ``tag``, and in which order.

    Those above a threshold, the most confident first, at most ``MAX_OBJECTS``. Of equal confidence the last one is
    first, as in the benchmark, which sorts ascending and turns that round.
    """
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    order = sorted(range(len(confidences)), key=confidences.__getitem__)[::-1]
    return [i for i in order if confidences[i] > threshold][:MAX_OBJECTS]


def directions(box: tuple[float, ...], target: tuple[float, ...]) -> set[str]:
    """Where ``box`` lies as seen from ``target``: a subset of left of, right of, above, below.

    The offset of the centres counts only beyond a tenth of the summed sizes (GenEval's position threshold), and a
    direction holds when what remains of it makes up more than half of the whole offset's length.
    """
    mine, theirs = np.reshape(box, (2, 2)), np.reshape(target, (2, 2))
    offset = mine.mean(0) - theirs.mean(0)
    slack = _POSITION_THRESHOLD * (np.abs(mine[1] - mine[0]) + np.abs(theirs[1] - theirs[0]))
    beyond = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, held in holds.items() if held}


def _placed(objects: list[Detection], where: str, targets: list[Detection]) -> bool:
    return all(where in directions(one.box, other.box) for one in objects for other in targets)


def _by_class(detections: list[Detection]) -> dict[str, list[Detection]]:
    """Objects of every class, the most confident first."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.confidence):
        found.setdefault(detection.name, []).append(detection)
    return found


def _exceeded(found: dict[str, list[Detection]], metadata: dict[str, Any]) -> list[str]:
    counts = [(item["class"], len(found.get(item["class"], ())), item["count"]) for item in metadata.get("exclude", ())]
    return [f"{name}: found {n}, allowed fewer than {limit}" for name, n, limit in counts if n >= limit]


def benchmark(detections: list[Detection], metadata: dict[str, Any]) -> bool:
    """The benchmark's own rule: of each included class at least ``count`` objects, the most confident ``count`` of
    them all in the asked colour and position, and no excluded class at its count or above.

    Args:
        detections: objects found in the picture, in any order; of equal confidence the first one is taken, so that
            the order of ``counted`` holds.
        metadata: a GenEval entry with ``include`` and optionally ``exclude``.
    """
    found = _by_class(detections)
    groups: list[list[Detection] | None] = []
    for item in metadata.get("include", ()):
        objects = found.get(item["class"], [])[: item["count"]]
        matched = len(objects) == item["count"]
        matched = matched and all(d.color == item["color"] for d in objects if "color" in item)
        if matched and "position" in item:
            where, index = item["position"]
            targets = groups[index]
            matched = targets is not None and _placed(objects, where, targets)
        groups.append(objects if matched else None)
    return None not in groups and not _exceeded(found, metadata)


def judge(detections: list[Detection], metadata: dict[str, Any]) -> Verdict:
    """Apply both rules. The strict one asks for exactly ``count`` objects of each included class, all in the asked
    colour and position, and for no excluded class at its count or above.

    ``partial`` is the published training score, the mean over what is asked: 1 - |asked - found| / asked for a count,
    the same for a colour, 1 for a position. A wrong count earns 0 for its colour or position. A wrong position counts
    as 0 and 1, not as 0; where its anchor is missing it counts as 0; where its colour is wrong it is not counted. That
    is what the published runs were trained on.

    Args:
        detections: objects found in the picture, in any order.
        metadata: a GenEval entry with ``include`` and optionally ``exclude``.
    """
    found = _by_class(detections)
    credits: list[float] = []
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []
    for item in metadata.get("include", ()):
        name, count = item["class"], item["count"]
        objects = found.get(name, [])
        credits.append(1 - abs(count - len(objects)) / count)
        missed = [] if len(objects) == count else [f"{name}: asked {count}, found {len(objects)}"]
        if missed and ("color" in item or "position" in item):
            credits.append(0.0)
        if "color" in item and not missed:
            agree = sum(d.color == item["color"] for d in objects)
            credits.append(1 - (count - agree) / count)
            if agree < count:
                missed.append(f"{name}: asked {count} {item['color']}, found {agree}")
        if "position" in item and not missed:
            where, index = item["position"]
            targets = groups[index]
            placed = targets is not None and _placed(objects, where, targets)
            credits += [1.0] if placed else [0.0] if targets is None else [0.0, 1.0]
            if not placed:
                missed.append(f"{name}: not {where} {metadata['include'][index]['class']}")
        reasons += missed
        groups.append(None if missed else objects)
    reasons += _exceeded(found, metadata)
    partial = sum(credits) / len(credits) if credits else 0.0
    return Verdict(float(benchmark(detections, metadata)), float(not reasons), partial, tuple(reasons))
