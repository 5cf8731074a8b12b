"""Configuration: typed, validated, from a bundled or user YAML file with ``key=value`` overrides."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nft_kernels.solvers import SOLVERS

Solver = Literal[tuple(SOLVERS)]  # type: ignore[valid-type]
_BUNDLED = Path(__file__).parent / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what came and what is accepted."""


class Config(BaseModel):
    """All settings of a run. Defaults are those of the shapes world."""

    model_config = ConfigDict(extra="forbid")

    pipeline: str = "shapes"
    """Hub name or folder of a Stable Diffusion 3 pipeline; ``shapes`` is the bundled one."""
    task: Literal["shapes", "geneval"] = "shapes"
    seed: int = 0
    device: str = "cpu"
    """Device of the pipeline and of GPU rewards, such as ``cpu`` or ``cuda``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; adapters and latents are float32 always."""
    resolution: int | None = Field(None, gt=0)
    """Width and height of a picture in pixels; the pipeline's own by default."""
    gradient_checkpointing: bool = False

    lora_rank: int = Field(32, gt=0)
    lora_alpha: int = Field(64, gt=0)

    epochs: int = Field(120, gt=0)
    prompts_per_epoch: int = Field(24, gt=0)
    group_size: int = Field(12, gt=1)
    """Pictures per prompt, among which rewards are compared."""
    rollout_steps: int = Field(10, gt=0)
    rollout_solver: Solver = "euler"
    rollout_options: dict[str, float] = {}
    """The solver's own options, such as ``{eta: 0.5}``."""
    rollout_batch: int = Field(96, gt=0)
    compile_rollout: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """Mode of torch.compile for the transformer of rollouts; ``reduce-overhead`` captures CUDA graphs."""
    max_sequence_length: int = Field(10, gt=0)

    timesteps_per_sample: int = Field(3, gt=0)
    """How many of the rollout's times each picture is trained on in an epoch."""
    updates_per_epoch: int = Field(2, gt=0)
    micro_batch: int = Field(48, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    old_policy: Literal["copy", "linear_0.5", "delayed_0.999"] = "linear_0.5"

    beta: float = Field(1.0, gt=0)
    adv_clip_max: float = Field(5.0, gt=0)
    kl_weight: float = Field(1e-4, ge=0)
    weighting: Literal["adaptive", "none", "t", "t2"] = "adaptive"
    advantage_mode: Literal["continuous", "positive_only", "negative_only", "one_only", "binary"] = "continuous"
    advantage_std: Literal["global", "group"] = "global"

    eval_every: int = Field(10, gt=0)
    eval_prompts_per_group: int = Field(20, gt=0)
    eval_steps: int = Field(10, gt=0)
    eval_solver: Solver = "heun"
    verify_kernels_steps: int = Field(2, ge=0)
    """For how many optimizer steps the loss is compared with the float64 reference; 0 turns it off."""


def load_config(name: str, overrides: list[str] | None = None) -> Config:
    """Read a configuration.

    Args:
        name: a bundled configuration's name or the path of a YAML file.
        overrides: ``key=value`` strings, the value in YAML.

    Raises:
        ConfigError: unknown file, key or value.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _BUNDLED / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _BUNDLED.glob("*.yaml")))
        raise ConfigError(f"config: got {name!r}, accepted are {known} or the path of a YAML file")
    values: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    for item in overrides or []:
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"override: got {item!r}, accepted is key=value")
        values[key] = yaml.safe_load(value)
        # YAML reads 3e-4 as text; the number was meant.
        if isinstance(values[key], str):
            try:
                values[key] = float(values[key])
            except ValueError:
                pass
    try:
        return Config(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                near = get_close_matches(key, Config.model_fields, n=1)
                lines.append(f"{key}: unknown key" + (f", did you mean {near[0]}?" if near else ""))
            else:
                lines.append(f"{key}: got {problem['input']!r}, {problem['msg'][0].lower()}{problem['msg'][1:]}")
        raise ConfigError("; ".join(lines)) from None
