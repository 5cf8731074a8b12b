"""Prompts of many kinds of pictures for rewards that ask for no particular thing, generated from a seed."""

from __future__ import annotations

import random
from typing import Any

_STYLES = (
    "a photograph", "an oil painting", "watercolour", "a pencil drawing", "pixel art", "a film still", "a 3D rendering",
    "a travel poster", "a page of a children's book", "a stained glass window", "an ink print", "a scale model",
)  # fmt: skip
_SUBJECTS = {
    "person": (
        "an old fisherman", "a girl with a kite", "a street musician", "two chess players", "a baker at work",
        "an astronaut", "a dancer", "a knight", "a cyclist", "a woman who reads", "a beekeeper",
        "a clown without a smile",
    ),
    "animal": (
        "a fox", "an owl with round glasses", "a sleeping cat", "a herd of horses", "an octopus", "a small dragon",
        "a parrot on a bicycle", "a hedgehog", "a whale", "three ducks in a row", "a robot dog", "a tiger cub",
    ),
    "thing": (
        "a bowl of ramen", "an old typewriter", "a red sports car", "a glass chess set", "a steam locomotive",
        "a stack of books", "a grand piano", "a hot-air balloon", "a lighthouse made of ice", "a pocket watch",
        "a sailing ship in a bottle", "a bicycle with square wheels",
    ),
    "place": (
        "a floating market", "a tiny house", "a castle on a cliff", "a library without a ceiling", "a narrow street",
        "a greenhouse", "a desert station", "a harbour town", "a temple", "an abandoned theme park", "a mountain hut",
        "a city of towers",
    ),
}  # fmt: skip
_WHERE = (
    "by the sea", "in a snowy forest", "under a starry sky", "in the rain", "in a field of lavender",
    "among skyscrapers",
    "on the moon", "in a sunlit valley", "behind a waterfall", "in thick fog", "beneath cherry trees",
    "in a desert storm",
    "on a rooftop", "in an empty hall", "between giant mushrooms", "beside a frozen lake",
)  # fmt: skip
_LIGHTS = (
    "at dawn", "at noon", "at dusk", "by candlelight", "in neon light", "lit from behind", "in soft colours",
    "in black and white",
)  # fmt: skip
KINDS = tuple(_SUBJECTS)


def generate(per_kind: int, seed: int) -> list[dict[str, Any]]:
    """``per_kind`` different prompts of every one of ``KINDS``, which is their ``tag``.

    Args:
        per_kind: at most 18432, the number of different prompts of a kind.
        seed: the same seed gives the same prompts.

    Raises:
        ValueError: a count that is not in 1 to 18432.
    """
    most = len(_STYLES) * len(_SUBJECTS[KINDS[0]]) * len(_WHERE) * len(_LIGHTS)
    if not 1 <= per_kind <= most:
        raise ValueError(f"per_kind: got {per_kind}, accepted is 1 to {most}")
    stream = random.Random(seed)
    entries = []
    for kind, subjects in _SUBJECTS.items():
        for index in stream.sample(range(most), per_kind):
            index, style = divmod(index, len(_STYLES))
            index, subject = divmod(index, len(subjects))
            light, where = divmod(index, len(_WHERE))
            prompt = f"{subjects[subject]} {_WHERE[where]} {_LIGHTS[light]}, {_STYLES[style]}"
            entries.append({"tag": kind, "prompt": prompt})
    return entries
