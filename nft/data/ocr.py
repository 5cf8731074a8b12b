"""Prompts that quote a text to draw, generated from a seed."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

_PLACES = (
    "a shop window with a sign that says {}",
    "a chalkboard on which {} is written",
    "a neon sign in the rain that reads {}",
    "a wooden signpost at a crossroads with {} carved into it",
    "a book cover with the title {}",
    "a coffee mug with {} printed on it",
    "a poster on a brick wall that says {}",
    "a birthday cake with {} in icing",
    "a train station display that shows {}",
    "a T-shirt on a hanger that reads {}",
    "a handwritten note on a fridge with {} on it",
    "a banner over a street that says {}",
)
_ADJECTIVES = (
    "Bright", "Quiet", "Golden", "Little", "Open", "Fresh", "Silver", "Hidden", "Happy", "Lost", "Warm", "Brave",
    "Simple", "Early", "Wild", "Gentle",
)  # fmt: skip
_NOUNS = (
    "Garden", "River", "Coffee", "Market", "Planet", "Harbor", "Forest", "Bakery", "Station", "Window", "Mountain",
    "Library", "Summer", "Castle", "Bridge", "Island",
)  # fmt: skip
_ENDINGS = ("", " Today", " Club", " 24", " Sale", " No 7", " Tour", " Ahead")


def generate(count: int, seed: int, quarters: Collection[int] = range(4)) -> list[dict[str, Any]]:
    """``count`` different prompts, each with ``tag`` ocr, ``prompt`` and the ``text`` that it quotes.

    Args:
        count: at most 6144 a quarter, the number of different prompts.
        seed: the same seed gives the same prompts.
        quarters: which texts, of 0 to 3; no adjective comes with the same noun in two of them.

    Raises:
        ValueError: a count that is not in 1 to 6144 a quarter.
    """
    pairs = [(i + j, f"{one} {two}") for i, one in enumerate(_ADJECTIVES) for j, two in enumerate(_NOUNS)]
    texts = [pair + ending for diagonal, pair in pairs if diagonal % 4 in quarters for ending in _ENDINGS]
    most = len(_PLACES) * len(texts)
    if not 1 <= count <= most:
        raise ValueError(f"count: got {count}, accepted is 1 to {most}")
    entries = []
    for index in random.Random(seed).sample(range(most), count):
        text, place = texts[index // len(_PLACES)], _PLACES[index % len(_PLACES)]
        entries.append({"tag": "ocr", "prompt": place.format(f'"{text}"'), "text": text})
    return entries
