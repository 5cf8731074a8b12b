"""A run's result in the formats of diffusers: a LoRA file, or a whole pipeline with the adapter merged in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from .files import check_folder, check_vacant, give_usual_mode, reading
from .models.base import left_out
from .policy import pipeline_source, unloadable
from .weights import (
    LORA,
    WEIGHTS,
    check_fit,
    check_layers,
    lora_layers,
    lora_settings,
    named_weights,
    sound_weights,
    weight_shapes,
)


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    # The libraries that write tensors wrap a full disk in errors of their own, without a common class.
    except Exception as error:
        raise OSError(f"output: {output} could not be written: {error}") from error


def export_lora(source: Path, output: Path, *, weights: str = "ema") -> None:
    """Write ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of diffusers takes. Its scale is 1, and
    alpha / rank multiplied into the float32 weights: not every tool reads diffusers' settings.

    Args:
        source: a run, one of its checkpoints, or the folder or file of a LoRA in PEFT's or diffusers' format.
        output: folder to write to.
        weights: ``ema`` for the averaged weights that evaluations use, ``default`` for the trained ones.

    Raises:
        CheckpointError: a checkpoint whose files are damaged.
        FileExistsError: an output that is a file, lies in a checkpoint, or holds a run or such a LoRA.
        FileNotFoundError: a source that holds no adapter.
        OSError: an output that cannot be written to, as on a full disk.
        ValueError: the whole weights of full fine-tuning, damaged files, or a LoRA of other names.
    """
    check_folder(output)
    check_vacant(output, ("metrics.jsonl", LORA))
    path = sound_weights(source, weights)
    if path.name == WEIGHTS:
        raise ValueError(f"source: {path.parent} holds whole weights; export them with --merge")
    layers = lora_layers(path)
    settings = lora_settings(path, layers)
    scale = settings["lora_alpha"] / settings["r"]
    settings["lora_alpha"] = settings["r"]
    scaled = named_weights({layer: (down, up * scale) for layer, (down, up) in layers.items()})
    # The file's format is the same for every pipeline with a ``transformer``.
    with _writing(output):
        StableDiffusion3Pipeline.save_lora_weights(
            output, transformer_lora_layers=scaled, transformer_lora_adapter_metadata=settings
        )
    give_usual_mode(output / LORA)


def export_pipeline(source: Path, output: Path, pipeline: str, *, weights: str = "ema", half: bool = False) -> None:
    """Write a whole pipeline folder whose transformer has the adapter merged into its weights, or the trained weights.

    Args:
        source, weights: as for ``export_lora``.
        output: folder to write to, new or empty.
        pipeline: name or folder of the pipeline that was trained; ``shapes`` is the bundled one.
        half: write bfloat16, in which the run has drawn, and not float32, in which the weights are added up.

    Raises:
        CheckpointError: a checkpoint whose files are damaged.
        FileExistsError: an output that is a file, lies in a checkpoint or holds anything.
        FileNotFoundError, OSError: a source without adapter, or a pipeline that cannot be loaded.
        ValueError: damaged files, or an adapter or weights of layers that the pipeline does not have.
    """
    check_folder(output)
    check_vacant(output)
    path = sound_weights(source, weights)
    dtype = torch.bfloat16 if half else torch.float32
    try:
        # All of it: encoders are often stored in half precision, and as many dtypes could not be drawn with.
        whole = DiffusionPipeline.from_pretrained(folder := pipeline_source(pipeline), dtype=dtype, **left_out(folder))
    except (OSError, ValueError) as error:
        raise unloadable(pipeline, error) from error
    if path.name == WEIGHTS:
        # What does not fit diffusers would leave out, or begin anew.
        check_fit(path, weight_shapes(path), whole.transformer.state_dict())
        with reading(path.parent, "source"):
            whole.register_modules(transformer=type(whole.transformer).from_pretrained(path.parent, dtype=dtype))
    else:
        layers = lora_layers(path)
        settings = lora_settings(path, layers)
        check_layers(path, layers, whole.transformer)
        for layer, (down, up) in layers.items():
            weight = whole.transformer.get_submodule(layer).weight.data
            # As in rollouts.
            weight.copy_(torch.addmm(weight.float(), up, down, alpha=settings["lora_alpha"] / settings["r"]))
    with _writing(output):
        whole.save_pretrained(output)
    for path in output.rglob("*.safetensors"):
        give_usual_mode(path)
