"""The kinds of pipeline that can be trained; ``docs/models.md`` says how to add one."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from .base import Model
from .flux import Flux
from .qwen_image import QwenImage
from .sd3 import StableDiffusion3

MODELS: dict[str, type[Model]] = {kind.pipeline_class.__name__: kind for kind in (StableDiffusion3, Flux, QwenImage)}


def find(source: str) -> type[Model]:
    """The model of a pipeline in a folder or on the hub, by the class that its index names. Nothing else is read.

    Raises:
        OSError: no index.
        ValueError: a pipeline of another class.
    """
    name = DiffusionPipeline.load_config(source).get("_class_name")
    if name not in MODELS:
        raise ValueError(f"pipeline: {source!r} is a {name}, accepted are {', '.join(MODELS)}")
    return MODELS[name]
