"""Draw a picture that fits a prompt's metadata."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from . import COLORS, SHAPES, SIZE

_OVERSAMPLE = 4
_GAP = 4
_MARGIN = 2
_DIAMETERS = {1: (18, 30), 2: (16, 24), 3: (14, 19), 4: (14, 18)}


def outline(shape: str, left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """Corners of a ``square``, ``triangle`` or ``cross`` that fills the box."""
    width, height = right - left, bottom - top
    unit = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "cross": [(x / 3, y / 3) for x, y in
                  [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1)]],
    }[shape]  # fmt: skip
    return [(left + x * width, top + y * height) for x, y in unit]


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, ...], fill: Any) -> None:
    """Draw one filled shape into ``box`` = (left, top, right, bottom)."""
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon(outline(shape, *box), fill=fill)


def _fits(box: tuple[int, ...], others: list[tuple[int, ...]]) -> bool:
    return all(
        box[0] >= o[2] + _GAP or o[0] >= box[2] + _GAP or box[1] >= o[3] + _GAP or o[1] >= box[3] + _GAP for o in others
    )


def _in_place(box: tuple[int, ...], target: tuple[int, ...], where: str) -> bool:
    """Whether ``box`` lies clearly in direction ``where`` of ``target`` and in no other."""
    dx = (box[0] + box[2] - target[0] - target[2]) / 2
    dy = (box[1] + box[3] - target[1] - target[3]) / 2
    along, across = (dx, dy) if where in ("left of", "right of") else (dy, dx)
    sign = 1 if where in ("right of", "below") else -1
    return sign * along > 2 * abs(across)


def _layout(items: list[dict[str, Any]], rng: random.Random) -> list[tuple[int, ...]]:
    low, high = _DIAMETERS[len(items)]
    while True:
        boxes: list[tuple[int, ...]] = []
        for item in items:
            for _ in range(20):
                diameter = rng.randint(low, high)
                left, top = (rng.randint(_MARGIN, SIZE - _MARGIN - diameter) for _ in range(2))
                box = (left, top, left + diameter, top + diameter)
                where, target = item.get("position", (None, 0))
                if _fits(box, boxes) and (where is None or _in_place(box, boxes[target], where)):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(items):
            return boxes


def render(metadata: dict[str, Any], rng: random.Random) -> np.ndarray:
    """Draw a picture for which the prompt is true.

    Args:
        metadata: a prompt of ``prompts``; only ``include`` is read. A missing colour is drawn at random.
        rng: source of positions, sizes and free colours.

    Returns:
        uint8 array of shape (64, 64, 3).
    """
    items = [item | {"count": 1} for item in metadata["include"] for _ in range(item["count"])]
    image = Image.new("RGB", (SIZE * _OVERSAMPLE,) * 2, "white")
    draw = ImageDraw.Draw(image)
    for item, box in zip(items, _layout(items, rng), strict=True):
        color = COLORS[item.get("color") or rng.choice(list(COLORS))]
        draw_shape(draw, item["class"], tuple(edge * _OVERSAMPLE for edge in box), color)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def template(shape: str, width: int, height: int) -> np.ndarray:
    """Coverage in [0, 1] of ``shape`` filling a box of ``width`` x ``height`` pixels, shape (height, width)."""
    if shape not in SHAPES:
        raise ValueError(f"shape: got {shape!r}, accepted are {', '.join(SHAPES)}")
    image = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    draw_shape(ImageDraw.Draw(image), shape, (0, 0, width * _OVERSAMPLE, height * _OVERSAMPLE), 255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
