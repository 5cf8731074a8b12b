"""Whether a picture shows the text that its prompt quotes (Liu et al., Flow-GRPO, arXiv 2505.05470)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Metadata, Reward, Scored

_QUOTED = re.compile(r'"([^"]*)"')


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: insertions, deletions and substitutions of one character cost 1."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def text_score(read: str, target: str) -> float:
    """1 - distance / length of the target, case and spaces aside.

    A target that is contained in what was read scores 1, and the distance is capped at the target's length, so that
    more text beside it costs no more than no text.
    """
    read, target = ("".join(text.split()).casefold() for text in (read, target))
    if not target:
        raise ValueError("target: got no text, accepted is at least one character other than a space")
    if target in read:
        return 1.0
    return 1 - min(edit_distance(read, target), len(target)) / len(target)


def target_of(prompt: str, entry: dict[str, object]) -> str:
    """The text to draw: ``text`` in the metadata, or else the first in the prompt's double quotes that is not blank.

    Raises:
        ValueError: neither, or a ``text`` that is none.
    """
    if not isinstance(entry.get("text", ""), str):
        raise ValueError(f"text: got {entry['text']!r}, accepted is a text")
    target = entry.get("text", next(filter(str.strip, _QUOTED.findall(prompt)), None))
    if target is None:
        raise ValueError(f'prompt: got {prompt!r}, accepted for OCR is one with "quoted text"')
    return str(target)


Read = Callable[[np.ndarray], str]
"""The text in an RGB picture (H, W, 3)."""


def _rapidocr() -> Read:
    from rapidocr import RapidOCR

    # One thread each: the pool runs several processes.
    threads = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    # Its classifier would turn upside-down text upright, which then scores as if it had been drawn so.
    engine: Any = RapidOCR(params={"Global.log_level": "error", "Global.use_cls": False, **threads})
    return lambda picture: "".join(engine(picture[..., ::-1]).txts or ())


def _paddleocr() -> Read:
    from paddleocr import PaddleOCR

    engine = PaddleOCR(
        lang="en", use_doc_orientation_classify=False, use_doc_unwarping=False, use_textline_orientation=False
    )
    return lambda picture: "".join(text for page in engine.predict(picture[..., ::-1]) for text in page["rec_texts"])


class OCR(Reward):
    """How much of the prompt's quoted text RapidOCR reads: ``text_score``; the detail is 1 for all of it."""

    range = (0.0, 1.0)
    packages = ("rapidocr", "onnxruntime")
    extra = "ocr"
    engine = staticmethod(_rapidocr)

    def __init__(self) -> None:
        self.read = self.engine()

    @staticmethod
    def check_prompt(prompt: str, entry: dict[str, Any]) -> None:
        text_score("", target_of(prompt, entry))

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        targets = [target_of(prompt, entry) for prompt, entry in zip(prompts, metadata, strict=True)]
        texts = [self.read(picture.numpy()) for picture in pictures.cpu()]
        scores = [text_score(text, target) for text, target in zip(texts, targets, strict=True)]
        return Scored(torch.tensor(scores), {"exact": torch.tensor([float(score == 1) for score in scores])})


class PaddleOCR(OCR):
    """The same with PaddleOCR 3."""

    packages = ("paddleocr", "paddle")
    extra = "paddleocr"
    engine = staticmethod(_paddleocr)
