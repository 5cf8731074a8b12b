"""Configuration: typed, validated, from a bundled or user YAML file with ``key=value`` overrides."""

from __future__ import annotations

import re
import textwrap
from bisect import bisect
from collections.abc import Collection, Sequence
from dataclasses import fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nft_kernels.solvers import SOLVERS, schedule, table

from . import plugins
from .alarms import SHARES, THRESHOLDS
from .objectives import OBJECTIVES, Objective, unread
from .rewards import registry
from .rewards.pool import RewardSpec
from .settings import ConfigError, Dumper, override, read_based

# What policy, optimizer and run are built with once: a stage cannot change it.
_FIXED = {
    "plugins", "stages", "pipeline", "seed", "device", "dtype", "resolution", "gradient_checkpointing", "offload",
    "adapter", "lora_rank", "lora_alpha", "max_sequence_length", "save_every", "keep_checkpoints", "keep_every",
    "tracker", "alarms", "eval_every", "preflight", "compile_rollout", "cuda_graphs", "float8_rollout",
    "fused_transformer", "shard",
}  # fmt: skip
# Names that other trainers have for a setting, which are too far from ours to be guessed.
_ELSEWHERE = {
    "lr": "learning_rate", "num_image_per_prompt": "group_size", "num_generations": "group_size",
    "mixed_precision": "dtype", "num_inference_steps": "rollout_steps", "num_steps": "rollout_steps",
    "num_epochs": "epochs", "train_batch_size": "rollout_batch", "batch_size": "micro_batch", "model": "pipeline",
    "pretrained": "pipeline", "height": "resolution", "width": "resolution", "reward_fn": "rewards",
    "decay_type": "old_policy", "ema_decay": "old_policy", "eval_freq": "eval_every", "save_freq": "save_every",
    "use_lora": "adapter", "noise_level": "rollout_options.eta", "sde_window_size": "window",
    "num_checkpoint_limit": "keep_checkpoints", "max_train_steps": "epochs", "solver": "rollout_solver",
    "sampler": "rollout_solver", "eta": "rollout_options.eta", "steps": "rollout_steps", "compile": "compile_rollout",
    "grad_clip": "max_grad_norm", "clip": "max_grad_norm", "precision": "dtype", "bf16": "dtype", "fp16": "dtype",
    "eval_interval": "eval_every", "save_interval": "save_every", "kl": "kl_weight", "wd": "weight_decay",
    "random_seed": "seed", "num_images": "group_size", "images_per_prompt": "group_size", "train.beta": "kl_weight",
    "kl_beta": "kl_weight", "kl_coef": "kl_weight", "ref_kl_coef": "kl_weight", "adv_clip_range": "adv_clip_max",
    "weight_copy_decay_type": "old_policy", "timestep_fraction": "timesteps_per_sample",
    "num_train_timesteps": "timesteps_per_sample", "num_batches_per_epoch": "prompts_per_epoch",
    "fp8": "float8_rollout", "float8": "float8_rollout", "fsdp": "shard",
    "global_std": "advantage_std", "adv_mode": "advantage_mode", "eval_num_steps": "eval_steps",
}  # fmt: skip
# And of what is none.
_NOT_HERE = {
    "guidance_scale": "rollouts and training use no guidance",
    "cfg": "rollouts and training use no guidance",
    "cfg_scale": "rollouts and training use no guidance",
    "guidance": "rollouts and training use no guidance",
    "gradient_accumulation_steps": "updates_per_epoch and micro_batch say all",
    "grad_accum": "updates_per_epoch and micro_batch say all",
    "resume": "it is `nft train --output FOLDER --resume`",
    "output": "it is `nft train --output FOLDER`",
    "base": "it is a key of files; `--config NAME` names another configuration",
    "log_every": "every epoch is logged",
    "lr_scheduler": "the learning rate is constant",
    "warmup_steps": "the learning rate is constant",
    "gpus": "it is `torchrun --nproc-per-node N -m nft.cli train`",
    "resume_from": "it is `nft train --output FOLDER --resume`",
    "run_name": "it is `nft train --output FOLDER`",
    "lora_path": "`nft export LORA FOLDER --merge --pipeline NAME`, then pipeline=FOLDER, begins with a LoRA",
}
# What does nothing without another setting.
_PARTNERS = {
    "explore_steps": "explore",
    "explore_float8": "explore",
    "filter_std": "filter_mean",
    "window_order": "window",
    "window_epochs": "window",
}


class Config(BaseModel):
    """All settings of a run. The defaults fit the shapes world, whose configuration changes a few of them."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    plugins: list[str] = []
    """Modules of your own, on the path or in the working folder, that register solvers, objectives or models."""
    pipeline: str = Field("shapes", min_length=1)
    """Hub name or folder of a pipeline of a class in ``nft.models``; ``shapes`` is the bundled one."""
    task: Literal["shapes", "rewards"] = "shapes"
    """``rewards`` scores with ``rewards`` on the prompts of ``prompts``; ``shapes`` brings both."""
    prompts: str | None = Field(None, min_length=1)
    """For the task ``rewards``: ``shapes``, ``geneval``, ``ocr``, ``preference``, or a .txt or .jsonl file."""
    held_out_prompts: str | None = Field(None, min_length=1)
    """The same to evaluate on; by default of the same set, and beside a file it must be given."""
    rewards: dict[str, Any] = {}
    """For the task ``rewards``: the weight of every reward by name, or the settings of ``RewardSpec``, such as
    ``{mine: {reward: "module:attribute", weight: 0.5, workers: 2}}``. The first one is reported; one of weight 0 is
    only watched."""
    combine: Literal["sum", "normalized_sum", "gdpo", "per_reward"] = "sum"
    """How several rewards become one advantage."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of every random choice, each of which comes from a stream named by seed, epoch and purpose."""
    device: str = "cpu"
    """Device of the pipeline and of GPU rewards, ``cpu``, ``cuda`` or ``cuda:1``; with several processes ``cuda`` is a
    GPU for each."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen weights; adapters and latents are float32 always."""
    resolution: int | None = Field(None, gt=0, multiple_of=8)
    """Width and height of a picture in pixels; the pipeline's own by default."""
    gradient_checkpointing: bool = False
    """Activations of a block are computed anew in the backward, which saves memory and takes another forward pass."""
    offload: bool = False
    """Text encoders and VAE wait in host memory between uses."""
    shard: bool = False
    """Each of several processes holds a part of the transformer's weights, and of all that training adds to them with
    ``adapter=full``."""
    fused_transformer: Literal["auto", True, False] = False
    """Evaluate the transformer by ``nft_kernels.models.sd3``, all policies alike; with ``auto`` where pipeline and
    settings allow it."""

    adapter: Literal["lora", "full"] = "lora"
    """``full`` trains every weight of the transformer, in float32."""
    lora_rank: int = Field(32, gt=0)
    """Of the adapters."""
    lora_alpha: int = Field(64, gt=0)
    """Adapters are scaled by ``lora_alpha / lora_rank``."""

    epochs: int = Field(120, gt=0)
    """How often pictures are sampled and trained on."""
    stages: list[dict[str, Any]] = []
    """A curriculum: each stage has its ``epochs`` and whatever differs from the settings outside."""
    prompts_per_epoch: int = Field(24, gt=0, le=100_000)
    """Prompts of an epoch, over all processes."""
    group_size: int = Field(12, gt=1, le=10_000)
    """Pictures per prompt, among which rewards are compared."""
    explore: int | None = Field(None, gt=1, le=10_000)
    """Candidates per prompt, of which the best and the worst, ``group_size`` in all, are drawn again and trained on."""
    explore_steps: int | None = Field(None, gt=0)
    """Solver steps of the candidates; ``rollout_steps`` by default."""
    explore_float8: bool = False
    """Matrix products of the candidates in float8, as ``float8_rollout`` has them for all pictures."""
    filter_mean: float | None = None
    """A group is not trained on if its mean reward reaches this and its deviation is below ``filter_std``."""
    filter_std: float = Field(0.05, gt=0)
    """See ``filter_mean``."""
    rollout_steps: int = Field(10, gt=0, le=1000)
    """Steps of the solver in a rollout."""
    timestep_spacing: Literal["even", "pipeline"] = "even"
    """How times are spaced before the scheduler's shift, in rollouts and evaluations: evenly down to 0, or as by
    diffusers' own call of the pipeline."""
    rollout_solver: str = "euler"
    """A name of ``nft solvers``."""
    rollout_options: dict[str, Any] = {}
    """The solver's own options, such as ``{eta: 0.5}``."""
    window: int | None = Field(None, gt=0)
    """How many steps of the solver ``mixed`` draw noise; where they lie moves with the epoch."""
    window_order: Literal["sliding", "random"] = "sliding"
    """``sliding`` moves it a step at a time and starts over at the end, ``random`` puts it anywhere in the first
    half."""
    window_epochs: int = Field(1, gt=0)
    """For how many epochs the window stays where it is."""
    rollout_batch: int = Field(96, gt=0)
    """Most pictures that a process samples at a time; a CPU fills them up to a multiple of 16, a GPU the last ones to
    this many."""
    compile_rollout: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """Mode of torch.compile for the transformer of rollouts; ``reduce-overhead`` captures CUDA graphs."""
    cuda_graphs: bool = False
    """Evaluations of full batches, in rollouts and in training, are replayed as CUDA graphs. Their memory is kept."""
    float8_rollout: bool = False
    """Matrix products of rollouts in float8, which needs ``fused_transformer`` and a GPU, or torch on a CPU,
    that has them."""
    max_sequence_length: int = Field(10, gt=0, le=4096)
    """Tokens of a prompt; of its T5 encoder for Stable Diffusion 3 and FLUX.1."""

    objective: str = "nft"
    """What is learned of the pictures: DiffusionNFT, ``nft``, or a baseline of docs/baselines.md."""
    timesteps_per_sample: int = Field(3, gt=0)
    """How many of the rollout's times each picture is trained on in an epoch; of its noisy steps for ``grpo``."""
    shared_noise: bool = False
    """Times and noise are drawn once for all pictures of a prompt."""
    updates_per_epoch: int = Field(6, gt=0)
    """Optimizer steps that the pictures of an epoch are shared out over."""
    micro_batch: int = Field(144, gt=0)
    """Most pairs of picture and time that a process differentiates at a time."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of AdamW, decoupled."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The norm that gradients are clipped to."""
    old_policy: Literal["copy", "linear_0.5", "delayed_0.999"] = "linear_0.5"
    """The eta of theta_old <- eta theta_old + (1-eta) theta at step i: 0 for ``copy``, min(0.001 i, 0.5) for
    ``linear_0.5``, and for ``delayed_0.999`` 0 below i = 75, then min(0.0075 (i - 75), 0.999)."""
    old_policy_counts: Literal["epochs", "updates"] = "epochs"
    """What that schedule goes by: epochs, the iterations of the paper, or optimizer steps, as in its code."""

    beta: float = Field(1.0, gt=0)
    """Strength of the implicit policies, v+- = v_old +- beta (v_theta - v_old)."""
    adv_clip_max: float = Field(5.0, gt=0, le=1e6)
    """M: advantages A are clipped to +-M, r = A / (2M) + 1/2, and the loss is scaled by M."""
    kl_weight: float = Field(1e-4, ge=0)
    """Of the mean squared difference of the velocities to those of the reference model, which is not evaluated at 0."""
    weighting: Literal["adaptive", "none", "t", "t2", "1/t", "1/t2", "(1-t)/t2"] = "adaptive"
    """``adaptive`` divides the errors of a sample by their mean size, the others weigh them by time; see
    ``nft_loss``."""
    advantage_mode: Literal["continuous", "positive_only", "negative_only", "one_only", "binary"] = "continuous"
    """What of an advantage counts: all, its positive or its negative side, 1 where it is positive, or its sign."""
    advantage_std: Literal["global", "group"] = "global"
    """The deviation that advantages are divided by: of all pictures of the epoch or of the group."""
    rwr_temperature: float = Field(1.0, gt=0)
    """Of ``rwr``, whose weights are exp(A / rwr_temperature)."""
    clip_range: float = Field(1e-4, gt=0)
    """Of the ratio to the old policy, for ``grpo`` and ``awm``."""

    eval_every: int = Field(10, gt=0)
    """Epochs from one evaluation on held-out prompts to the next."""
    eval_prompts_per_group: int = Field(20, gt=0, le=100_000)
    """Held-out prompts of every task group."""
    eval_steps: int = Field(10, gt=0, le=1000)
    """Steps of the solver in an evaluation."""
    eval_solver: str = "heun"
    """A name of ``nft solvers``; another one than in rollouts shows whether the policy depends on it."""
    save_every: int = Field(1, gt=0)
    """Epochs from one checkpoint to the next, from which an interrupted run goes on; one is written before every
    evaluation, too."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many of the newest checkpoints stay; the best by held-out score always does."""
    keep_every: int | None = Field(None, gt=0)
    """Checkpoints of epochs that are multiples of this stay as well, such as those before a reward was exploited."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where numbers are sent beside metrics.jsonl, and pictures of evaluations to the first two."""
    alarms: dict[str, float] = {}
    """Thresholds that replace those of ``nft.alarms.THRESHOLDS``."""
    preflight: bool = True
    """Sample, score, decode and take a step on a copy before the first epoch."""
    verify_kernels_steps: int = Field(2, ge=0)
    """For how many optimizer steps the loss is compared with the float64 reference; 0 turns it off."""

    _stages: list[Config] = PrivateAttr([])

    def __init__(self, **values: Any) -> None:
        """Check all settings, and how they fit together.

        Raises:
            ConfigError: an unknown key, or a value that cannot be used.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_problems(error)) from None

    @property
    def pictures(self) -> int:
        """Pictures in an epoch, over all processes."""
        return self.prompts_per_epoch * self.group_size

    @property
    def pairs(self) -> int:
        """Pairs of a picture and a time in an epoch, over all processes."""
        return self.pictures * self.timesteps_per_sample

    @property
    def candidates(self) -> int:
        """Pictures of an epoch that are drawn cheaply to choose among, over all processes."""
        return self.prompts_per_epoch * (self.explore or 0)

    @property
    def fused(self) -> bool:
        """Whether the transformer is to be evaluated by ``nft_kernels``, if it is one that can."""
        if self.fused_transformer == "auto":
            return self.adapter == "lora" and not self.shard and not self.compile_rollout
        return self.fused_transformer

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, float):
            check_float32(str(info.field_name), value)
        if isinstance(value, int) and info.field_name != "seed" and value >= 2**31:
            raise ValueError(f"{info.field_name}: got {value}, accepted are numbers below 2**31")
        return value

    @field_validator("fused_transformer", mode="before")
    @classmethod
    def _no_number(cls, value: Any) -> Any:
        # A literal takes 1 for True.
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise ValueError(f"fused_transformer: got {value}, accepted are auto, true and false")
        return value

    # Fields are checked in their order, so that what a plugin registers is known to those that follow.
    @field_validator("plugins")
    @classmethod
    def _imported(cls, modules: list[str]) -> list[str]:
        plugins.load_all(modules)
        for name, objective in OBJECTIVES.items():
            if not isinstance(objective, Objective) or not {*objective.reads} <= cls.model_fields.keys():
                accepted = "an Objective, of which reads is a tuple of names of settings"
                raise ValueError(f"plugins: got {objective!r} as the objective {name!r}, accepted is {accepted}")
        return modules

    @field_validator("rollout_solver", "eval_solver", "objective")
    @classmethod
    def _registered(cls, name: str, info: ValidationInfo) -> str:
        known: Collection[str] = OBJECTIVES if info.field_name == "objective" else SOLVERS
        if name not in known:
            raise ValueError(f"{info.field_name}: got {name!r}, accepted are {', '.join(known)}")
        return name

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", device):
            raise ValueError(f"device: got {device!r}, accepted are cpu, cuda and cuda:N")
        return device

    @field_validator("alarms")
    @classmethod
    def _known_alarms(cls, alarms: dict[str, float]) -> dict[str, float]:
        for name in alarms:
            if name not in THRESHOLDS:
                raise ValueError(f"alarms.{registry.unknown(name, THRESHOLDS)}")
            share = name in SHARES
            if alarms[name] < 0 or (share and alarms[name] > 1):
                accepted = "shares, 0 to 1" if share else "numbers of at least 0"
                raise ValueError(f"alarms.{name}: got {alarms[name]}, accepted are {accepted}")
        return alarms

    @field_validator("rewards")
    @classmethod
    def _known_rewards(cls, rewards: dict[str, Any]) -> dict[str, Any]:
        specs = {name: _reward_spec(name, value) for name, value in rewards.items()}
        for name, spec in specs.items():
            if not name:
                raise ValueError("rewards: got the name '', accepted is one that scores are logged under")
            if name == "std" or name.endswith("_std"):
                raise ValueError(f"rewards: got the name {name!r}, accepted are others: deviations are logged so")
            if ":" not in spec.reward and spec.reward not in registry.known():
                guess = registry.guess(spec.reward, registry.known())
                raise ValueError(f"rewards.{name}: unknown reward {spec.reward}{guess}; `nft rewards` lists them")
        if specs and not any(spec.weight for spec in specs.values()):
            raise ValueError(f"rewards: got {rewards}, accepted is at least one with a weight above 0")
        return rewards

    def reward_specs(self) -> dict[str, RewardSpec]:
        """``rewards`` by the name that they are logged under."""
        return {name: _reward_spec(name, value) for name, value in self.rewards.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        # _curriculum checks what each stage makes of it.
        if not self.stages:
            self._fit_defaults()
            self._check_partners()
            self._check_limits()
            self._check_task()
            self._check_speed()
            self._check_solvers()
        return self

    def _fit_defaults(self) -> None:
        """To an epoch that is smaller than theirs."""
        if "micro_batch" not in self.model_fields_set:
            self.__dict__["micro_batch"] = min(self.micro_batch, self.pairs)
        if "updates_per_epoch" not in self.model_fields_set:
            self.__dict__["updates_per_epoch"] = min(self.updates_per_epoch, self.pictures)

    def _check_partners(self) -> None:
        """What does nothing as the other settings are."""
        if self.window and (self.rollout_solver != "mixed" or "window" in self.rollout_options):
            raise ValueError(
                f"window: got {self.window} with {self.rollout_solver} and options {self.rollout_options}, accepted is "
                "the solver mixed without a window among its options"
            )
        if self.explore is not None and self.explore <= self.group_size:
            raise ValueError(f"explore: got {self.explore}, accepted are numbers above {self.group_size}, group_size")
        idle = [(key, f"without {partner}") for key, partner in _PARTNERS.items() if getattr(self, partner) is None]
        idle += [(key, f"with objective={self.objective}") for key in sorted(unread(self.objective))]
        idle += [(key, "with adapter=full") for key in ("lora_rank", "lora_alpha") if self.adapter == "full"]
        for key, why in idle:
            came, default = getattr(self, key), Config.model_fields[key].default
            if came != default:
                accepted = "null" if default is None else default
                raise ValueError(f"{key}: got {came} {why}, accepted is {accepted} then")

    def _check_limits(self) -> None:
        for key, largest, what in (
            ("explore_steps", self.rollout_steps, "rollout_steps"),
            ("window", self.rollout_steps, "rollout_steps"),
            ("timesteps_per_sample", self.rollout_steps, "rollout_steps"),
            ("updates_per_epoch", self.pictures, "the pictures of an epoch, prompts_per_epoch * group_size"),
            ("micro_batch", self.pairs, "the pairs of an epoch, prompts_per_epoch * group_size * timesteps_per_sample"),
        ):
            if (getattr(self, key) or 0) > largest:
                raise ValueError(f"{key}: got {getattr(self, key)}, accepted are 1 to {largest}, {what}")

    def _check_task(self) -> None:
        if (self.task == "rewards") != bool(self.rewards):
            rule = "the task rewards needs at least one, shapes brings its own"
            raise ValueError(f"rewards: got {self.rewards or 'none'}, but the task is {self.task}; {rule}")
        for key, plain in (("prompts", None), ("held_out_prompts", None), ("combine", "sum")):
            if self.task != "rewards" and getattr(self, key) != plain:
                raise ValueError(f"{key}: got {getattr(self, key)} with task={self.task}, which brings its own")
        if self.task == "rewards" and self.prompts is None:
            raise ValueError("prompts: got none, the task rewards needs a bundled set of prompts or a file")
        if self.combine == "per_reward" and self.objective != "nft":
            raise ValueError(f"combine: got per_reward with objective={self.objective}, it makes the r of nft only")

    def _check_speed(self) -> None:
        """What makes a run faster, and with what it goes."""
        for key in ("float8_rollout", "explore_float8"):
            if getattr(self, key) and (self.fused_transformer is not True or self.compile_rollout):
                raise ValueError(f"{key}: got true, it needs fused_transformer=true and no compile_rollout")
            if getattr(self, key) and self.device != "cpu" and self.dtype != "bfloat16":
                raise ValueError(f"{key}: got true with dtype={self.dtype}, on a GPU it needs bfloat16")
        if self.cuda_graphs:
            for key, plain in (
                ("adapter", "lora"), ("gradient_checkpointing", False), ("compile_rollout", None), ("shard", False),
            ):  # fmt: skip
                if (came := getattr(self, key)) != plain:
                    accepted = "null" if plain is None else plain
                    raise ValueError(f"cuda_graphs: got true with {key}={came}, accepted is {accepted} then")
            if self.device == "cpu":
                raise ValueError("cuda_graphs: got true with device=cpu, accepted is a GPU")
        if self.fused_transformer is True and self.adapter == "full":
            # It joins the projections of frozen weights only, so that old and trained policy would round differently.
            raise ValueError("fused_transformer: got true with adapter=full, accepted is lora")
        for key in ("fused_transformer", "compile_rollout"):
            if self.shard and (came := getattr(self, key)) not in (None, False, "auto"):
                raise ValueError(f"shard: got true with {key}={came}, it needs the transformer as it is")

    def _check_solvers(self) -> None:
        """Whether the solvers take their steps and options, and draw the noise that the objective trains on."""
        # Where a window can lie: its first and its last place, as only the ends of a rollout may draw less noise.
        last = self.rollout_steps - (self.window or 0)
        if self.window_order == "random":
            last = max(self.rollout_steps // 2 - (self.window or 0), 0)
        places = [{"window": (start, start + self.window)} for start in {0, last}] if self.window else [{}]
        own = [{**self.rollout_options, **place} for place in places]
        for options in own:
            self._check_trained_rows(self._noisy_rows("rollout_solver", self.rollout_steps, options))
        cheap = self.explore_steps or self.rollout_steps
        if cheap != self.rollout_steps and self._noisy_rows("rollout_solver", cheap, own[0]):
            # Other steps draw other noise: an exact picture would have little to do with its candidate.
            raise ValueError(
                f"explore_steps: got {self.explore_steps}, but {self.rollout_solver} draws noise in its steps; "
                f"accepted is {self.rollout_steps}, rollout_steps, or a solver that draws none"
            )
        self._noisy_rows("eval_solver", self.eval_steps, {})

    def _noisy_rows(self, key: str, steps: int, options: dict[str, Any]) -> list[int]:
        """The rows that draw noise of the solver that ``key`` names."""
        solver = getattr(self, key)
        try:
            return table(solver, schedule(steps), **options).noisy
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: got {solver} with options {options}, which it does not take: {error}") from None

    def _check_trained_rows(self, drawn: list[int]) -> None:
        """Whether an objective that trains on the rollout's rows with noise has enough of them, one after another."""
        if not OBJECTIVES[self.objective].trajectory:
            return
        if drawn and drawn[-1] - drawn[0] >= len(drawn):
            raise ValueError(
                f"rollout_solver: got {self.rollout_solver}, which draws noise in the rows {drawn}, but "
                f"{self.objective} trains on rows one after another"
            )
        if self.timesteps_per_sample > len(drawn):
            raise ValueError(
                f"timesteps_per_sample: got {self.timesteps_per_sample}, but {self.objective} trains on the steps that "
                f"draw noise, and {self.rollout_solver} has {len(drawn)} of them"
            )

    @model_validator(mode="after")
    def _curriculum(self) -> Config:
        outside = self.model_dump(exclude={"stages", "epochs"}, exclude_unset=True)
        stages = []
        for i, stage in enumerate(self.stages):
            for key in stage:
                if key in _FIXED:
                    raise ValueError(f"stages.{i}.{key}: cannot differ between stages; set it outside")
            if "epochs" not in stage:
                raise ValueError(f"stages.{i}.epochs: missing, every stage needs its length")
            try:
                stages.append(_validated({**outside, **stage}))
            except ConfigError as error:
                raise ValueError(f"stages.{i}.{error}") from None
        if stages:
            total = sum(stage.epochs for stage in stages)
            if "epochs" in self.model_fields_set and self.epochs != total:
                raise ValueError(
                    f"epochs: got {self.epochs}, but the stages add up to {total}; change those of a stage, such as "
                    "stages.0.epochs"
                )
            self.__dict__["epochs"] = total
        self._stages = stages
        return self

    def at(self, epoch: int) -> Config:
        """The settings of one epoch (from 0): those of its stage, or these."""
        return self._stages[self.stage_index(epoch)] if self._stages else self

    def all_stages(self) -> list[Config]:
        """Every stage in its order, or these settings alone."""
        return self._stages or [self]

    def stage_index(self, epoch: int) -> int:
        """Which stage an epoch (from 0) belongs to; the end belongs to the last."""
        ends = list(accumulate(stage.epochs for stage in self._stages))
        return min(bisect(ends, epoch), max(len(ends) - 1, 0))

    def dump(self, *, explained: bool = False) -> str:
        """The resolved settings as YAML that ``load_config`` takes, with a comment on each if ``explained``."""
        # What nobody set follows from each stage's own epoch.
        derived = {"epochs", *({"micro_batch", "updates_per_epoch"} - self.model_fields_set)} if self._stages else set()
        values = self.model_dump(exclude=derived)
        dump = partial(yaml.dump, Dumper=Dumper, sort_keys=False)
        if not explained:
            return dump(values)
        return "".join(_comment(key) + dump({key: value}) for key, value in values.items())


def _comment(key: str) -> str:
    """What a setting does, in lines of YAML."""
    field = Config.model_fields[key]
    about = (field.description or "").replace("``", "`")
    if names := _choices(field.annotation):
        about += f" One of {', '.join(map(str, names))}."
    lines = textwrap.wrap(about, 118, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines)


def _choices(annotation: Any) -> list[Any]:
    """What a ``Literal`` in an annotation accepts."""
    parts = get_args(annotation)
    return list(parts) if get_origin(annotation) is Literal else [name for part in parts for name in _choices(part)]


def check_float32(key: str, value: float) -> None:
    """Whether a number can be one of float32.

    Raises:
        ValueError: it cannot.
    """
    held = torch.finfo(torch.float32)
    if value and not held.tiny <= abs(value) <= held.max:
        raise ValueError(f"{key}: got {value}, accepted are numbers that float32 holds, {held.tiny:g} to {held.max:g}")


def _reward_spec(name: str, value: Any) -> RewardSpec:
    settings = value if isinstance(value, dict) else {"weight": value}
    known = [field.name for field in fields(RewardSpec)]
    for key in settings:
        if key not in known:
            raise ValueError(f"rewards.{name}.{registry.unknown(key, known)}")
    weight = settings.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
        raise ValueError(f"rewards.{name}: got {weight!r}, accepted is a weight of at least 0, or settings with one")
    check_float32(f"rewards.{name}", weight)
    try:
        spec = RewardSpec(**{"reward": name, **settings})
        if spec.device is not None:
            Config._known_device(spec.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rewards.{name}.{error}") from None
    return spec


def _unknown(key: str) -> str:
    name = key.rpartition(".")[2].lower()
    if name in _NOT_HERE:
        return f"{key}: unknown key; {_NOT_HERE[name]}"
    if found := _ELSEWHERE.get(key) or _ELSEWHERE.get(name):
        return f"{key}: unknown key, did you mean {found}?"
    return registry.unknown(key, Config.model_fields, "`nft config show` lists the known ones")


def _problems(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            # Other trainers' settings lie in parts, such as train.beta.
            inner = problem["input"] if isinstance(problem["input"], dict) else {}
            lines += [_unknown(f"{key}.{name}") for name in inner] or [_unknown(key)]
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]))
        else:
            lines.append(f"{key}: got {problem['input']!r}, {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "; ".join(lines)


def _validated(values: dict[str, Any]) -> Config:
    return Config(**{str(key): value for key, value in values.items()})


def load_config(name: str | Path, overrides: Sequence[str] | None = None) -> Config:
    """Read a configuration.

    Args:
        name: a bundled configuration's name or the path of a YAML file, either of which may name a ``base``.
        overrides: ``key=value`` strings, the value in YAML, the key dotted for what is nested, such as
            ``rollout_options.eta=0.5`` or ``stages.0.epochs=10``. The last of equal keys holds.

    Raises:
        ConfigError: a file that is missing, empty or no YAML mapping, an unknown key, or a value that cannot be used.
    """
    if not isinstance(name, str | Path):
        raise ConfigError(f"config: got {name!r}, accepted is the name of a configuration or the path of a YAML file")
    if isinstance(overrides, str) or not all(isinstance(item, str) for item in overrides or []):
        raise ConfigError(f"overrides: got {overrides!r}, accepted is a list of key=value texts")
    values = read_based(str(name), Path())
    for item in overrides or []:
        override(values, item)
    return _validated(values)


def usable_device(name: str) -> torch.device:
    """The device of a configuration.

    Raises:
        ValueError: no device of a configuration, or one that this machine lacks.
    """
    device = torch.device(Config._known_device(name))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {name!r}, but this machine has no usable GPU; accepted is cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise ValueError(f"device: got {name!r}, but this machine has cpu and cuda:0 to cuda:{last}")
    return device
