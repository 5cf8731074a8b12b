"""A task: prompts to train on, held-out prompts, and a score for pictures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from .data import geneval
from .rewards.detector import GenEvalReward
from .rewards.geneval import Verdict
from .worlds.shapes.prompts import sample, split
from .worlds.shapes.verify import verify


class Task(Protocol):
    """Made with the policy's device.

    ``score`` returns (B, 2): the reward that is trained and the strict score that is reported, both in [0, 1].
    """

    def __init__(self, device: torch.device) -> None: ...
    def train_prompts(self) -> list[list[dict[str, Any]]]: ...
    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]: ...
    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor: ...


def _table(verdicts: Iterable[Verdict]) -> Tensor:
    return torch.tensor([(verdict.partial, verdict.strict) for verdict in verdicts])


class Shapes:
    """The bundled shapes world: trains on GenEval's partial credit, reports the strict score."""

    def __init__(self, device: torch.device) -> None:
        pass

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group."""
        return list(split(held_out=False).values())

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on."""
        return sample(held_out=True, per_group=per_group)

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """Partial and strict score of uint8 pictures (B, H, W, 3)."""
        return _table(verify(picture.numpy(), entry) for picture, entry in zip(pictures.cpu(), entries, strict=True))


class GenEval:
    """GenEval with COCO objects: trains on the partial credit, reports the strict score.

    The held-out prompts are generated with another seed, and training prompts that are among them are left out.
    """

    _BATCH = 16
    _PER_GROUP = 5000
    _TRAIN_SEED, _HELD_OUT_SEED = 1, 2

    def __init__(self, device: torch.device) -> None:
        self.reward = GenEvalReward(device)

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group; the 80 single objects are trained on and never held out."""
        held_out = {entry["prompt"] for entry in self.held_out_prompts(100)}
        groups = geneval.generate(self._PER_GROUP, self._TRAIN_SEED).values()
        return [[entry for entry in group if entry["prompt"] not in held_out] for group in groups]

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on."""
        groups = geneval.generate(100, self._HELD_OUT_SEED)
        return [entry for tag, group in groups.items() if tag != "single_object" for entry in group[:per_group]]

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """Partial and strict score of uint8 pictures (B, H, W, 3), scored 16 at a time."""
        parts = [slice(start, start + self._BATCH) for start in range(0, len(entries), self._BATCH)]
        return _table(verdict for part in parts for verdict in self.reward(pictures[part], entries[part]))


TASKS: dict[str, type[Task]] = {"shapes": Shapes, "geneval": GenEval}
