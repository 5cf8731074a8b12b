"""GenEval's rule (Ghosh et al., arXiv 2310.11513): from detected objects to a score, as a pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_POSITION_THRESHOLD = 0.1


@dataclass(frozen=True)
class Detection:
    """One detected object: ``box`` is (left, top, right, bottom) in pixels, y pointing down."""

    name: str
    box: tuple[float, float, float, float]
    confidence: float = 1.0
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Result of the rule: ``strict`` is 0 or 1, ``partial`` is in [0, 1], ``reasons`` says what was missed."""

    strict: float
    partial: float
    reasons: tuple[str, ...]


def directions(box: tuple[float, ...], target: tuple[float, ...]) -> set[str]:
    """Where ``box`` lies as seen from ``target``: a subset of left of, right of, above, below.

    The offset of the centres counts only beyond a tenth of the summed sizes, and a direction holds when it makes
    up more than half of the remaining offset's length (GenEval's position threshold).
    """
    offset = []
    for low, high in ((0, 2), (1, 3)):
        centre = (box[low] + box[high] - target[low] - target[high]) / 2
        slack = _POSITION_THRESHOLD * (box[high] - box[low] + target[high] - target[low])
        offset.append(max(abs(centre) - slack, 0.0) * (1 if centre > 0 else -1))
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    if length < 1e-3:
        return set()
    found = set()
    for component, negative, positive in ((offset[0], "left of", "right of"), (offset[1], "above", "below")):
        if component / length > 0.5:
            found.add(positive)
        elif component / length < -0.5:
            found.add(negative)
    return found


def judge(detections: list[Detection], metadata: dict[str, Any]) -> Verdict:
    """Apply the strict rule: each included class must appear exactly ``count`` times, all in the asked colour and
    position, and no excluded class may reach its count.

    ``partial`` is the mean credit over the single demands: 1 - |asked - found| / asked (at least 0) for a count or
    a colour, 0 or 1 for a position or an exclusion. A colour or position earns nothing while the count is wrong.

    Args:
        detections: objects found in the picture.
        metadata: a GenEval entry with ``include`` and optionally ``exclude``.
    """
    credits: list[float] = []
    reasons: list[str] = []

    def demand(credit: float, reason: str) -> bool:
        credits.append(max(credit, 0.0))
        if credit < 1:
            reasons.append(reason)
        return credit == 1

    groups: list[list[Detection] | None] = []
    for item in metadata["include"]:
        name, count = item["class"], item["count"]
        objects = [d for d in detections if d.name == name]
        matched = demand(1 - abs(count - len(objects)) / count, f"{name}: asked {count}, found {len(objects)}")
        if "color" in item:
            agree = sum(d.color == item["color"] for d in objects) if matched else 0
            credit = 1 - abs(count - agree) / count
            matched &= demand(credit, f"{name}: asked {count} {item['color']}, found {agree}")
        if "position" in item:
            where, index = item["position"]
            target = groups[index]
            placed = matched and target is not None
            placed = placed and all(where in directions(d.box, t.box) for d in objects for t in target or ())
            matched &= demand(float(placed), f"{name}: not {where} {metadata['include'][index]['class']}")
        groups.append(objects if matched else None)
    for item in metadata.get("exclude", ()):
        found = sum(d.name == item["class"] for d in detections)
        if found >= item["count"]:
            reasons.append(f"{item['class']}: found {found}, allowed fewer than {item['count']}")
    return Verdict(float(not reasons), sum(credits) / len(credits), tuple(reasons))
