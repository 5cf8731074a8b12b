"""Draw a picture that fits a prompt's metadata."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from . import COLORS, SHAPES, SIZE

_OVERSAMPLE = 4
_CELL = SIZE // 2
_MARGIN = 3
_DIAMETERS = (20, 24)
_STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def outline(shape: str, left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    """Corners of a ``square`` or ``triangle`` that fills the box."""
    width, height = right - left, bottom - top
    corners: dict[str, list[tuple[float, float]]] = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
    }
    return [(left + x * width, top + y * height) for x, y in corners[shape]]


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: tuple[float, ...], fill: Any) -> None:
    """Draw one filled shape into ``box`` = (left, top, right, bottom)."""
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    else:
        draw.polygon(outline(shape, *box), fill=fill)


def _holds(item: dict[str, Any], cell: tuple[int, int], cells: list[tuple[int, int]]) -> bool:
    if "position" not in item:
        return True
    where, target = item["position"]
    return _STEPS[where] == (cell[0] - cells[target][0], cell[1] - cells[target][1])


def _cells(items: list[dict[str, Any]], rng: random.Random) -> list[tuple[int, int]]:
    """A cell (column, row) of the two-by-two grid for every object, such that all positions hold."""
    free = [(column, row) for row in range(2) for column in range(2)]
    while True:
        cells = rng.sample(free, len(items))
        if all(_holds(item, cell, cells) for item, cell in zip(items, cells, strict=True)):
            return cells


def render(metadata: dict[str, Any], rng: random.Random) -> np.ndarray:
    """Draw a picture for which the prompt is true: every object in a quarter of its own, of random size and place.

    Args:
        metadata: a prompt of ``prompts``; only ``include`` is read. A missing colour is drawn at random.
        rng: source of positions, sizes and free colours.

    Returns:
        uint8 array of shape (64, 64, 3).
    """
    items = [item | {"count": 1} for item in metadata["include"] for _ in range(item["count"])]
    image = Image.new("RGB", (SIZE * _OVERSAMPLE,) * 2, "white")
    draw = ImageDraw.Draw(image)
    for item, cell in zip(items, _cells(items, rng), strict=True):
        color = COLORS[item.get("color") or rng.choice(list(COLORS))]
        diameter = rng.randint(*_DIAMETERS)
        left, top = (rng.randint(_MARGIN, _CELL - _MARGIN - diameter) + _CELL * index for index in cell)
        box = (left, top, left + diameter, top + diameter)
        draw_shape(draw, item["class"], tuple(edge * _OVERSAMPLE for edge in box), color)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def template(shape: str, width: int, height: int) -> np.ndarray:
    """Coverage in [0, 1] of ``shape`` filling a box of ``width`` x ``height`` pixels, shape (height, width)."""
    if shape not in SHAPES:
        raise ValueError(f"shape: got {shape!r}, accepted are {', '.join(SHAPES)}")
    image = Image.new("L", (width * _OVERSAMPLE, height * _OVERSAMPLE))
    draw_shape(ImageDraw.Draw(image), shape, (0, 0, width * _OVERSAMPLE, height * _OVERSAMPLE), 255)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
