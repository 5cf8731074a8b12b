"""Files of what was trained: a LoRA in PEFT's or diffusers' format, or the whole weights of full fine-tuning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from .checkpoint import verify
from .files import is_checkpoint, reading

# An adapter in PEFT's format and in that of diffusers, and the whole weights in diffusers'.
ADAPTER, LORA, WEIGHTS = "adapter_model.safetensors", LORA_WEIGHT_NAME_SAFE, "diffusion_pytorch_model.safetensors"
DOWN, UP = "lora_A.weight", "lora_B.weight"
Layers = Mapping[str, tuple[Tensor, Tensor]]
# What stands in place of the transformer's and PEFT's names in files of a PeftModel, of diffusers and of others.
_NAMES = {
    r"^(base_model\.model\.)?(transformer\.|diffusion_model\.)?": "",
    r"\.lora[._]down\.weight$": f".{DOWN}",
    r"\.lora[._]up\.weight$": f".{UP}",
}
# Of a LoRA, where they are set: no product of two matrices and one number for all layers.
_OTHER = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")


def find_weights(folder: Path, kind: str = "ema") -> Path:
    """The file of the adapter or weights in a run, a checkpoint, or a folder that holds just them.

    Args:
        folder: where to look, or the file itself, of any name.
        kind: ``ema`` for a run's averaged weights, by which it is evaluated, ``default`` for the trained ones. Where
            there are no averaged ones the trained ones are taken.

    Raises:
        FileNotFoundError: none of these.
    """
    if folder.is_file():
        return folder
    for wanted in (kind, "default"):
        for candidate in (folder, folder / wanted, folder / "checkpoint" / wanted):
            for name in (ADAPTER, WEIGHTS, LORA):
                if (candidate / name).is_file():
                    return candidate / name
    raise FileNotFoundError(
        f"checkpoint: got {str(folder)!r}, accepted is a run, its checkpoint, the file of a LoRA, a folder with its "
        f"{ADAPTER} or {LORA}, or one with a {WEIGHTS}; of a LoRA on the hub it is the folder that `hf download` names"
    )


def sound_weights(folder: Path, kind: str = "ema") -> Path:
    """As ``find_weights``, for files that are not known to be what they were: in a checkpoint they are compared with
    what it says about them, and the path is that of the checkpoint itself, which a link to it may not stay.

    Raises:
        CheckpointError: files of a checkpoint that are damaged.
        FileNotFoundError: see ``find_weights``.
    """
    path = find_weights(folder, kind)
    inside = path.parent.resolve()
    if not is_checkpoint(inside.parent):
        return path
    # Of a whole checkpoint the trained ones are found where its averaged ones are lost.
    asked = inside.name if folder.resolve() in (inside, path.resolve()) else kind
    for part in {asked, inside.name}:
        verify(inside.parent, f"{part}/")
    return inside / path.name


def _rank(layers: Layers) -> int:
    """The largest of a LoRA's matrices."""
    return max(len(down) for down, _ in layers.values())


def lora_layers(path: Path) -> Layers:
    """A LoRA's matrices (rank, in) and (out, rank), float32, by the names of the transformer's layers. Alphas that the
    file has as tensors are multiplied into the latter, and zeros bring all ranks to the largest one.

    Raises:
        OSError: a file that is missing.
        ValueError: a file that is damaged, or has a name that is no such matrix's.
    """
    with reading(path, "checkpoint"):
        found = {name: weight.float() for name, weight in load_file(path).items()}
    for theirs, ours in _NAMES.items():
        found = {re.sub(theirs, ours, name): weight for name, weight in found.items()}
    layers = {}
    for layer in sorted({re.sub(rf"\.({DOWN}|{UP}|alpha)$", "", name) for name in found}) or ["nothing"]:
        down, up, alpha = (found.get(f"{layer}.{part}") for part in (DOWN, UP, "alpha"))
        # kohya's names have underscores for dots.
        kohya = layer.startswith("lora_")
        if kohya or down is None or up is None or down.ndim != 2 or up.shape[1:] != down.shape[:1]:
            raise ValueError(
                f"checkpoint: got {layer} in {path}, accepted are layers by their names in diffusers, each with {DOWN} "
                f"and {UP}, or lora.down.weight and lora.up.weight, of one rank"
            )
        layers[layer] = down, up if alpha is None else up * (alpha / len(down))
    rank = _rank(layers)
    return {
        layer: (pad(down, (0, 0, 0, rank - len(down))), pad(up, (0, rank - len(down))))
        for layer, (down, up) in layers.items()
    }


def named_weights(layers: Layers) -> dict[str, Tensor]:
    """The matrices of ``lora_layers`` by PEFT's names."""
    return {
        f"{layer}.{part}": weight
        for layer, pair in layers.items()
        for part, weight in zip((DOWN, UP), pair, strict=True)
    }


def _told(path: Path, layers: Layers) -> dict[str, Any]:
    """The settings in a file of diffusers. Without them, and where alphas stand for them, all scales are 1."""
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        if settings and not any(name.endswith(".alpha") for name in file.keys()):
            return {name.removeprefix("transformer."): value for name, value in settings.items()}
    rank = _rank(layers)
    return {"r": rank, "lora_alpha": rank, "target_modules": list(layers)}


def lora_settings(path: Path, layers: Layers) -> dict[str, Any]:
    """The settings of the LoRA whose ``layers`` are those of a file, as PEFT has them, with ``r`` and ``lora_alpha``.

    Raises:
        OSError: a file that is missing.
        ValueError: a file that is damaged or another LoRA's, or a kind of LoRA that is none of ours.
    """
    beside = path.with_name("adapter_config.json")
    with reading(beside if path.name == ADAPTER else path, "checkpoint"):
        settings = json.loads(beside.read_text()) if path.name == ADAPTER else _told(path, layers)
        rank, alpha = settings["r"], settings["lora_alpha"]
        if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not alpha > 0:
            raise TypeError("r and lora_alpha are no positive numbers")
    if other := [key for key in _OTHER if settings.get(key)]:
        raise ValueError(f"checkpoint: got a LoRA with {', '.join(other)} in {path.parent}, accepted is one without")
    if rank != (found := _rank(layers)):
        # Which its scale depends on.
        raise ValueError(f"checkpoint: got r={rank} beside {path}, accepted is the rank of its matrices, {found}")
    return settings


def check_layers(path: Path, layers: Layers, transformer: nn.Module) -> None:
    """Whether the layers of a file fit a transformer: PEFT would leave out what does not.

    Raises:
        ValueError: a layer that the transformer lacks or has in another size.
    """
    modules = dict(transformer.named_modules())
    for layer, (down, up) in layers.items():
        module, size = modules.get(layer), (len(up), down.shape[1])
        if not isinstance(module, nn.Linear) or module.weight.shape != size:
            raise ValueError(f"checkpoint: {path} does not fit the pipeline, which has no layer {layer} of size {size}")


def weight_shapes(path: Path) -> dict[str, Sequence[int]]:
    """Of all weights in a file, by name, without reading them.

    Raises:
        OSError: a file that is missing.
        ValueError: a file that is damaged.
    """
    with reading(path, "checkpoint"), safe_open(path, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


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
