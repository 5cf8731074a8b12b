"""The kinds of pipeline that can be trained; ``docs/models.md`` says how to add one."""

from __future__ import annotations

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from .base import Model
from .flux import Flux
from .qwen_image import QwenImage
from .sd3 import StableDiffusion3

MODELS: dict[str, type[Model]] = {kind.pipeline_class.__name__: kind for kind in (StableDiffusion3, Flux, QwenImage)}


def find(source: str) -> type[Model]:
    """The model of a pipeline in a folder or on the hub, by the class that its index names. Beside that only the
    scheduler's settings are read.

    Raises:
        OSError: no index, or no such settings.
        ValueError: a pipeline of another class, or a scheduler whose times or steps the model does not have.
    """
    index = DiffusionPipeline.load_config(source)
    name = index.get("_class_name")
    if name not in MODELS:
        raise ValueError(f"pipeline: {source!r} is a {name}, accepted are {', '.join(MODELS)}")
    settings = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    MODELS[name].check_scheduler(index["scheduler"][1], settings)
    return MODELS[name]
