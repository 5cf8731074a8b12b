"""How pictures travel to a reward server: a safetensors file with the texts in its header, so nothing is unpickled."""

from __future__ import annotations

import json
import math
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..data.text import parse_json
from .base import Metadata, Scored


def pack(pictures: Tensor, prompts: list[str], metadata: Metadata) -> bytes:
    """A batch as bytes; metadata must be what JSON can say."""
    texts = {"prompts": json.dumps(prompts), "metadata": json.dumps(metadata)}
    return safetensors.torch.save({"pictures": pictures.cpu().contiguous()}, texts)


def unpack(body: bytes, max_header: int) -> tuple[Tensor, list[str], Metadata]:
    """What ``pack`` made, with at most ``max_header`` bytes of texts: parsed, they may take many times as much.

    Raises:
        ValueError: anything else.
    """
    # The first eight bytes of a safetensors file are the length of its header.
    length = int.from_bytes(body[:8], "little")
    if max_header < length <= len(body):
        raise ValueError(f"header: got {length} bytes of texts, accepted are at most {max_header}")
    try:
        pictures = safetensors.torch.load(body)["pictures"]
        # The file was found valid: its header is JSON.
        header = parse_json(body[8 : 8 + length])["__metadata__"]
        prompts, metadata = parse_json(header["prompts"]), parse_json(header["metadata"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"body: got {type(error).__name__}, accepted is a batch made by nft.rewards.wire") from None
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
        raise ValueError("prompts: got something else, accepted is a list of texts")
    if not (isinstance(metadata, list) and all(isinstance(entry, dict) for entry in metadata)):
        raise ValueError("metadata: got something else, accepted is a list of objects")
    return pictures, prompts, metadata


def to_json(scored: Scored) -> dict[str, Any]:
    """Scores as JSON; Python writes a float32 so that it comes back the same. What is not finite JSON cannot say."""
    columns = {name: _list(values) for name, values in scored.details.items()}
    return {"score": _list(scored.score), "details": columns}


def _list(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float | None) for value in values)


def _tensor(values: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values])


def from_json(values: Any) -> Scored:
    """What ``to_json`` made.

    Raises:
        ValueError: anything else.
    """
    match values:
        case {"score": found, "details": dict(details)} if all(map(_numbers, [found, *details.values()])):
            return Scored(_tensor(found), {name: _tensor(detail) for name, detail in details.items()})
    raise ValueError(f"answer: got {str(values)[:100]}, accepted are lists of numbers, score and details")
