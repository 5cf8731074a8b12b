"""The shapes world's verifier as a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nft.rewards.base import Metadata, Reward, Scored
from nft.rewards.geneval import check_entry

from . import COLORS, SHAPES
from .verify import verify


class ShapesReward(Reward):
    """GenEval's partial credit, kept within [0, 1]; the details are the strict and the benchmark's rule."""

    range = (0.0, 1.0)
    needs = ("include",)
    packages = ("scipy",)
    extra = "train"

    @staticmethod
    def check_prompt(prompt: str, entry: dict[str, Any]) -> None:
        check_entry(entry, SHAPES, COLORS)

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        verdicts = [verify(picture.numpy(), entry) for picture, entry in zip(pictures.cpu(), metadata, strict=True)]
        details = {name: torch.tensor([getattr(v, name) for v in verdicts]) for name in ("strict", "correct")}
        return Scored(torch.tensor([max(v.partial, 0.0) for v in verdicts]), details)
