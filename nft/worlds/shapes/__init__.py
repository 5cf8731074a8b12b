"""The shapes world: coloured shapes on white, described in GenEval's metadata format.

``prompts`` lists the prompts, ``render`` draws a picture that fits one, ``verify`` reads a picture back,
and ``pretrain`` makes the tiny Stable Diffusion 3 pipeline that is fine-tuned on it.
"""

SIZE = 64
"""Width and height of a picture in pixels."""

SHAPES = ("circle", "square", "triangle")

COLORS = {
    "red": (222, 40, 40),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "yellow": (245, 205, 40),
}
"""Colour names and their RGB values."""
