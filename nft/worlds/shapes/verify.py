"""Read a picture of the shapes world: find the objects, then apply GenEval's rule."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from scipy import ndimage

from nft.rewards.geneval import Detection, Verdict, judge

from . import COLORS, SHAPES
from .render import template

_PALETTE = np.array([(255, 255, 255), *COLORS.values()], dtype=np.float32)
_FROM_WHITE = np.square(_PALETTE - _PALETTE[0]).sum(-1)
_NAMES = (None, *COLORS)
_MIN_SIDE = 8
_MIN_OVERLAP = 0.78
_MIN_COLOR_SHARE = 0.75


@cache
def _template(shape: str, width: int, height: int) -> np.ndarray:
    return template(shape, width, height) > 0.5


def _classify(mask: np.ndarray) -> tuple[str, float]:
    """Best shape for a filled mask cut to its bounding box, with its intersection over union."""
    height, width = mask.shape
    scores = {}
    for shape in SHAPES:
        filled = _template(shape, width, height)
        scores[shape] = float((mask & filled).sum() / (mask | filled).sum())
    best = max(scores, key=scores.__getitem__)
    return best, scores[best]


def detect(image: np.ndarray) -> list[Detection]:
    """Find the shapes in a picture.

    Pixels nearer to white than to any colour are background; every connected region of the rest is an object if
    one shape covers its bounding box well and most of its pixels agree on one colour. Anything else is ignored.

    Args:
        image: uint8 array (H, W, 3).

    Returns:
        one detection per object, with box (left, top, right, bottom) in pixels and the overlap as confidence.
    """
    # Squared distances, exact as these are integers below 2^24.
    pixels = image.reshape(-1, 3).astype(np.float32)
    distance = np.square(pixels) @ np.ones((3, 1), np.float32) - 2 * pixels @ _PALETTE.T + np.square(_PALETTE).sum(-1)
    nearest, to_white = (part.reshape(image.shape[:2]) for part in (distance.argmin(-1), distance[:, 0]))
    # A blurred edge mixes with white: half-way to the nearest colour it still belongs to the object.
    foreground = (to_white > 0.5**2 * _FROM_WHITE[nearest]) & (to_white > 60**2)
    regions, _ = ndimage.label(foreground)
    found = []
    for index, window in enumerate(ndimage.find_objects(regions), start=1):
        mask = regions[window] == index
        height, width = mask.shape
        if min(height, width) < _MIN_SIDE or max(height, width) > 1.5 * min(height, width):
            continue
        shape, overlap = _classify(mask)
        # The rim is blended with the background; the colour is read inside it.
        inside = ndimage.binary_erosion(mask)
        votes = np.bincount(nearest[window][inside], minlength=len(_NAMES))
        color = int(votes.argmax())
        if overlap < _MIN_OVERLAP or color == 0 or votes[color] < _MIN_COLOR_SHARE * votes.sum():
            continue
        rows, columns = window
        box = (columns.start, rows.start, columns.stop, rows.stop)
        found.append(Detection(shape, box, overlap, _NAMES[color]))
    return found


def verify(image: np.ndarray, metadata: dict[str, Any]) -> Verdict:
    """Judge a picture (uint8, H x W x 3) against a prompt's metadata by GenEval's strict rule."""
    return judge(detect(image), metadata)
