"""A run's result in the formats of diffusers: a LoRA file, or a whole pipeline with the adapter merged in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from .checkpoint import MANIFEST, check_folder, check_no_pipeline, reading
from .policy import SHAPES_PIPELINE, WEIGHTS, find_weights, lora_settings, lora_weights


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    try:
        yield
    # The libraries that write tensors wrap a full disk in errors of their own, without a common class.
    except Exception as error:
        raise OSError(f"output: {output} could not be written: {error}") from error


def _check(output: Path) -> None:
    check_folder(output)
    kept = next((folder for folder in (output, *output.absolute().parents) if (folder / MANIFEST).is_file()), None)
    if kept is not None:
        raise FileExistsError(f"output: {output} lies in the checkpoint {kept}; give another folder")


def export_lora(source: Path, output: Path, *, weights: str = "ema") -> None:
    """Write ``pytorch_lora_weights.safetensors``, which ``load_lora_weights`` of diffusers takes.

    Args:
        source: a run, one of its checkpoints, or a LoRA folder in PEFT's format.
        output: folder to write to.
        weights: ``ema`` for the averaged weights that evaluations use, ``default`` for the trained ones.

    Raises:
        FileExistsError: an output that is a file or lies in a checkpoint.
        FileNotFoundError: a source that holds no adapter.
        OSError: an output that cannot be written to, as on a full disk.
        ValueError: the whole weights of full fine-tuning, or damaged files.
    """
    _check(output)
    folder = find_weights(source, weights).parent
    if (folder / WEIGHTS).is_file():
        raise ValueError(f"source: {folder} holds whole weights; export them with --merge")
    layers, settings = lora_weights(folder), lora_settings(folder)
    # The file's format is the same for every pipeline with a ``transformer``.
    with _writing(output):
        StableDiffusion3Pipeline.save_lora_weights(
            output, transformer_lora_layers=layers, transformer_lora_adapter_metadata=settings
        )


def export_pipeline(source: Path, output: Path, pipeline: str, *, weights: str = "ema") -> None:
    """Write a whole pipeline folder whose transformer has the adapter merged into its weights, or the trained weights.

    Args:
        source, weights: as for ``export_lora``.
        output: folder to write to; it must not hold a pipeline.
        pipeline: name or folder of the pipeline that was trained; ``shapes`` is the bundled one.

    Raises:
        FileExistsError: an output that is a file, lies in a checkpoint or holds a pipeline already.
        FileNotFoundError, OSError: a source without adapter, or a pipeline that cannot be loaded.
        ValueError: damaged files.
    """
    _check(output)
    check_no_pipeline(output)
    name = str(SHAPES_PIPELINE) if pipeline == "shapes" else pipeline
    whole, folder = DiffusionPipeline.from_pretrained(name), find_weights(source, weights).parent
    if (folder / WEIGHTS).is_file():
        with reading(folder, "source"):
            whole.register_modules(transformer=type(whole.transformer).from_pretrained(folder))
    else:
        with TemporaryDirectory() as lora:
            export_lora(folder, Path(lora), weights=weights)
            whole.load_lora_weights(lora)
        whole.fuse_lora(components=["transformer"])
        whole.unload_lora_weights()
    with _writing(output):
        whole.save_pretrained(output)
