"""Files of what was trained: a LoRA in PEFT's or diffusers' format, or the whole weights of full fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint import reading

# An adapter in PEFT's format and in that of diffusers, and the whole weights in diffusers'.
ADAPTER, LORA, WEIGHTS = "adapter_model.safetensors", LORA_WEIGHT_NAME_SAFE, "diffusion_pytorch_model.safetensors"
# What stands before a layer's name in a file of a PeftModel, and of diffusers.
_PREFIXES = ("base_model.model.", "transformer.")
# Of a LoRA, where they are set: no product of two matrices and one number for all layers.
_OTHER = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def find_weights(folder: Path, kind: str = "ema") -> Path:
    """The file of the adapter or weights in a run, a checkpoint, or a folder that holds just them.

    Args:
        folder: where to look.
        kind: ``ema`` for a run's averaged weights, by which it is evaluated, ``default`` for the trained ones. Where
            there are no averaged ones the trained ones are taken.

    Raises:
        FileNotFoundError: none of these.
    """
    for wanted in (kind, "default"):
        for candidate in (folder, folder / wanted, folder / "checkpoint" / wanted):
            for name in (ADAPTER, WEIGHTS, LORA):
                if (candidate / name).is_file():
                    return candidate / name
    raise FileNotFoundError(
        f"checkpoint: got {str(folder)!r}, accepted is a run, its checkpoint, a folder with a LoRA's {ADAPTER} or "
        f"{LORA}, or one with a {WEIGHTS}; of a LoRA on the hub it is the folder that `hf download` names"
    )


def lora_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a LoRA, named by the transformer's layers.

    Raises:
        OSError: a file that is missing.
        ValueError: a file that is damaged.
    """
    with reading(path, "checkpoint"):
        weights = load_file(path)
    for prefix in _PREFIXES:
        weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    return weights


def _told(path: Path) -> dict[str, Any]:
    """The settings in a file of diffusers, or those that it is loaded with if there are none."""
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    if settings:
        return {name.removeprefix("transformer."): value for name, value in settings.items()}
    ranks = {name: len(weight) for name, weight in lora_weights(path).items() if name.endswith(".lora_A.weight")}
    layers = sorted(name.removesuffix(".lora_A.weight") for name in ranks)
    return {"r": max(ranks.values()), "lora_alpha": max(ranks.values()), "target_modules": layers}


def lora_settings(path: Path) -> dict[str, Any]:
    """The settings of a LoRA as PEFT has them, with ``r`` and ``lora_alpha``.

    Raises:
        OSError: a file that is missing.
        ValueError: a file that is damaged, or a kind of LoRA that is none of ours.
    """
    beside = path.with_name("adapter_config.json")
    with reading(beside if path.name == ADAPTER else path, "checkpoint"):
        settings = json.loads(beside.read_text()) if path.name == ADAPTER else _told(path)
        rank, alpha = settings["r"], settings["lora_alpha"]
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha > 0:
            raise TypeError("r and lora_alpha are no positive numbers")
    if other := [key for key in _OTHER if settings.get(key)]:
        raise ValueError(f"checkpoint: got a LoRA with {', '.join(other)} in {path.parent}, accepted is one without")
    return settings


def check_fit(path: Path, found: Mapping[str, Sequence[int]], wanted: Mapping[str, Tensor]) -> None:
    """Compare the shapes that a file has, by name, with the weights that a model needs.

    Raises:
        ValueError: other names or shapes.
    """
    other = sorted(
        name
        for name in found.keys() | wanted.keys()
        if name not in found or name not in wanted or list(found[name]) != list(wanted[name].shape)
    )
    if other:
        raise ValueError(
            f"checkpoint: {path} does not fit the pipeline: {len(other)} weights are missing, unknown or of another "
            f"shape, such as {other[0]}; give the configuration that it was trained with"
        )
