"""A task: prompts to train on, held-out prompts, and a score for pictures."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .worlds.shapes.prompts import sample, split
from .worlds.shapes.verify import verify


class Task(Protocol):
    """``score`` returns (B, 2): the reward that is trained and the strict score that is reported, both in [0, 1]."""

    def train_prompts(self) -> list[list[dict[str, Any]]]: ...
    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]: ...
    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor: ...


class Shapes:
    """The bundled shapes world: trains on GenEval's partial credit, reports the strict score."""

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group."""
        return list(split(held_out=False).values())

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on."""
        return sample(held_out=True, per_group=per_group)

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """Partial and strict score of uint8 pictures (B, H, W, 3)."""
        verdicts = [verify(picture.numpy(), entry) for picture, entry in zip(pictures.cpu(), entries, strict=True)]
        return torch.tensor([(verdict.partial, verdict.strict) for verdict in verdicts])


TASKS: dict[str, type[Task]] = {"shapes": Shapes}
