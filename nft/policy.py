"""The policy: a pipeline with the LoRA adapters ``default`` (trained) and ``old`` (rollouts)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import UserCpuOffloadHook
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor

from nft_kernels.backends import choose
from nft_kernels.solvers import schedule

from .config import Config, usable_device
from .console import say
from .distributed import several, shard
from .graphs import Graphs
from .models import MODELS, find
from .models.base import Model, check_resolution
from .surroundings import fingerprint
from .weights import ADAPTER, Layers, check_fit, find_weights, lora_layers, named_weights

# Of embeddings that are kept: those of 600 prompts of 205 tokens for Stable Diffusion 3.5.
KEPT_BYTES = 2**30
SHAPES_PIPELINE = Path(__file__).parent / "worlds" / "shapes" / "pipeline"


def pipeline_source(name: str) -> str:
    """Where the setting ``pipeline`` is loaded from: a hub name, a folder, or for ``shapes`` the bundled one's."""
    return str(SHAPES_PIPELINE) if name == "shapes" else name


def unloadable(pipeline: str, error: Exception) -> FileNotFoundError:
    """What to raise where loading the setting ``pipeline`` raised this."""
    if os.path.isdir(pipeline_source(pipeline)):
        hint = " Files of a variant, such as fp16, are not taken" if "no file named" in str(error) else ""
        return FileNotFoundError(f"pipeline: got {pipeline!r}, which cannot be loaded: {error}{hint}")
    hint = (
        "the bundled pipeline is missing: make it with `nft pretrain FOLDER` and set pipeline=FOLDER"
        if pipeline == "shapes"
        else "it is neither a folder with a saved pipeline nor a reachable hub name: accept the model's "
        "licence and run `hf download`, or give a folder"
    )
    return FileNotFoundError(f"pipeline: got {pipeline!r}, {hint}")


def times(steps: int, shift: float, terminal: float | None = None, last: float | None = None) -> Tensor:
    """``steps`` + 1 times from 1 to 0 with SD3's shift, in the float32 that the model is given, spaced as ``schedule``
    has them. Those above 0 are stretched so that the last of them is ``terminal``, as diffusers' ``shift_terminal``
    does."""
    *above, zero = schedule(steps, shift=shift, last=last)
    if terminal and steps > 1:
        above = [1 - (1 - t) / (1 - above[-1]) * (1 - terminal) for t in above]
    return torch.tensor([*above, zero], dtype=torch.float32)


def old_policy_decay(schedule: str, step: int) -> float:
    """eta of theta_old <- eta theta_old + (1-eta) theta after ``step`` epochs, or optimizer steps."""
    if schedule == "copy":
        return 0.0
    if schedule == "linear_0.5":
        return min(0.001 * step, 0.5)
    if schedule == "delayed_0.999":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise ValueError(f"schedule: got {schedule!r}, accepted are copy, linear_0.5, delayed_0.999")


def blocks(count: int, size: int, unit: int) -> Iterator[list[int]]:
    """Indices 0 .. ``count`` - 1 in blocks of ``size``, the last one filled up with its last index to a multiple of
    ``unit``: a matrix product rounds differently for another number of rows, and a sample's result must not depend on
    how many were evaluated with it."""
    for start in range(0, count, size):
        index = list(range(start, min(start + size, count)))
        yield index + index[-1:] * (-len(index) % unit)


def decoded_together(model: Model, latent_shape: Sequence[int]) -> int:
    """How many pictures of latents (C, H, W) the VAE decodes at once, whatever the batch: a megapixel, which for Stable
    Diffusion 3 and FLUX.1 is 10 TFLOP and takes 1.5 GiB in bfloat16."""
    pixels = math.prod(latent_shape[1:]) * model.pipeline.vae_scale_factor**2
    return min(max(2**20 // pixels, 1), 16)


def check_kind(config: Config, kind: type[Model]) -> None:
    """Whether a kind of model can do what a configuration asks of it.

    Raises:
        ValueError: it cannot.
    """
    name = kind.pipeline_class.__name__
    for key, needed in (("fused_transformer", "fast_path"), ("cuda_graphs", "recordable")):
        if getattr(config, key) is True and not getattr(kind, needed):
            able = ", ".join(other for other, model in MODELS.items() if getattr(model, needed))
            raise ValueError(f"{key}: got true for a {name}, accepted is {able}")
    if (came := config.max_sequence_length) > kind.longest:
        raise ValueError(f"max_sequence_length: got {came}, accepted for a {name} are 1 to {kind.longest}")


@contextmanager
def _loading(pipeline: str) -> Iterator[None]:
    """Name the pipeline, of which its libraries may say anything."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"pipeline: got {pipeline!r}, which cannot be loaded: {error!r}") from error
    except OSError as error:
        raise unloadable(pipeline, error) from error


def examine(config: Config) -> tuple[type[Model], torch.device]:
    """The kind of model and the device of a configuration, after all has been looked for that can be wrong without
    gigabytes of weights.

    Raises:
        FileNotFoundError, ValueError: as ``Policy``.
    """
    source = pipeline_source(config.pipeline)
    with _loading(config.pipeline):
        kind = find(source)
        check_kind(config, kind)
        if config.resolution:
            outline = kind.read_outline(source, getattr(torch, config.dtype))
            check_resolution(config.resolution, outline.unit, outline.largest)
        return kind, _device(config)


def _device(config: Config) -> torch.device:
    """The configuration's, on which the kernels that are asked for can run."""
    device = usable_device(config.device)
    try:
        choose("auto", torch.empty(0, device=device))
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return device


def _load(kind: type[Model], source: str, dtype: torch.dtype) -> Model:
    try:
        return kind(source, dtype)
    except ValueError as error:
        raise ValueError(f"pipeline: got {source!r}, which cannot be loaded: {error}") from error


class Policy:
    """Velocities under a chosen adapter, prompt embeddings and decoding of one pipeline."""

    def __init__(self, config: Config):
        """Load the pipeline (hub name, folder, or ``shapes``) and add both adapters, equal and without effect.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
            ValueError: a device that this machine lacks, a pipeline of an unknown class, or a resolution or a fast path
                that the transformer does not take.
        """
        self.dtype = getattr(torch, config.dtype)
        kind, self.device = examine(config)
        with _loading(config.pipeline):
            self.model = _load(kind, pipeline_source(config.pipeline), self.dtype)
        self.pipeline, self.transformer = self.model.pipeline, self.model.transformer
        parts = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        self.fingerprint = fingerprint(parts)
        self.sharded = config.shard and several()
        self._waiting: list[UserCpuOffloadHook] = []
        for part in parts:
            if part is self.transformer:
                # A sharded one may not fit a device as a whole.
                part.to("cpu" if self.sharded else self.device)
            elif config.offload:
                self._waiting.append(cpu_offload_with_hook(part, self.device)[1])
            else:
                part.to(self.device)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._add_adapters(config)
        if self._old:
            self.update_old(0.0)
        self._adapted = [layer for layer in self.transformer.modules() if isinstance(layer, LoraLayer)]
        self._merged: list[Tensor] = []
        self._fast_path = kind.fast_path(self.transformer) if kind.fast_path and config.fused else None
        self._float8 = config.float8_rollout
        self._graphs = Graphs(self.device) if config.cuda_graphs else None
        if self._fast_path:
            self._fast_path.keep_float8 = config.cuda_graphs
        self._forward = self.transformer
        self._rollout_forward = (
            torch.compile(self.transformer, mode=config.compile_rollout) if config.compile_rollout else self.transformer
        )
        self._resolution = config.resolution
        self._spacing = config.timestep_spacing
        self._max_sequence_length = config.max_sequence_length
        self._conditions: dict[str, tuple[Tensor, ...]] = {}
        self._warned = False
        self.use("default")

    def _add_adapters(self, config: Config) -> None:
        """What is trained, and its copy that samples."""
        self.lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=self.model.targets,
        )
        for name in ("default", "old"):
            self.transformer.add_adapter(self.lora, adapter_name=name)
        self.trained = self._adapter_parameters("default")
        self._old: Sequence[Tensor] = self._adapter_parameters("old")
        # Small updates would vanish in half-precision weights.
        for parameter in (*self.trained, *self._old):
            parameter.data = parameter.data.to(self.device, torch.float32)
        if self.sharded:
            shard(self.transformer, self.device, (*self.trained, *self._old))

    def _adapter_parameters(self, adapter: str) -> list[torch.nn.Parameter]:
        return [p for name, p in self.transformer.named_parameters() if f".{adapter}." in name]

    def use(self, adapter: str | None) -> None:
        """Choose the adapter of the next evaluations; None is the reference model."""
        if adapter is not None and adapter not in self.transformer.peft_config:
            raise ValueError(f"adapter: got {adapter!r}, accepted are None, {', '.join(self.transformer.peft_config)}")
        chosen = {"_disable_adapters": adapter is None} | ({} if adapter is None else {"_active_adapter": [adapter]})
        # PEFT's own set_adapter and enable_adapters search all modules and parameters: in Stable Diffusion 3.5 that
        # takes as long as an evaluation, and a training step chooses four times.
        for layer in self._adapted:
            vars(layer).update(chosen)
        self._evaluated: Any = adapter
        # Only ``default`` is ever trained.
        for parameter in self.trained:
            parameter.requires_grad_(adapter == "default")
        for old in self._old:
            old.requires_grad_(False)

    @contextmanager
    def merged(self, adapter: str, *, float8: bool = False) -> Iterator[None]:
        """Evaluate with an adapter's product added to copies of the adapted weights, which saves its two extra matrix
        products a layer. The sum is taken in float32; the base weights themselves are set aside and put back. The
        copies stay at one address for as long as the policy lives, so that a captured CUDA graph remains valid.

        Sharded weights stay as they are, and the adapter is evaluated beside them. With ``float8`` the matrix products
        are in float8 even where ``float8_rollout`` is not set."""
        if self.sharded:
            self.use(adapter)
            try:
                yield
            finally:
                self.use("default")
            return
        weights = [layer.base_layer.weight for layer in self._adapted]
        base = [weight.data for weight in weights]
        if not self._merged:
            self._merged = [torch.empty_like(weight) for weight in base]
        with torch.no_grad():
            for layer, weight, copy in zip(self._adapted, base, self._merged, strict=True):
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                copy.copy_(torch.addmm(weight.float(), up, down, alpha=layer.scaling[adapter]))
        self.use(None)
        try:
            for weight, copy in zip(weights, self._merged, strict=True):
                weight.data = copy
            with self._rollouts(float8):
                yield
        finally:
            # The fused path may have moved them together.
            self._merged = [weight.data for weight in weights]
            for weight, own in zip(weights, base, strict=True):
                weight.data = own
            self.use("default")

    @contextmanager
    def _rollouts(self, float8: bool) -> Iterator[None]:
        """Evaluate by what only rollouts may use: a compiled transformer, GELU in an epilogue, float8."""
        self._forward, float8 = self._rollout_forward, float8 or self._float8
        self._evaluated = "merged", float8
        try:
            with self._fast_path.rollout(float8=float8) if self._fast_path else nullcontext():
                yield
        finally:
            self._forward = self.transformer

    @torch.no_grad()
    def update_old(self, decay: float) -> None:
        """theta_old <- decay theta_old + (1-decay) theta."""
        for old, new in zip(self._old, self.trained, strict=True):
            old.lerp_(new, 1 - decay)
        self.old_is_current = decay == 0

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """The model's conditions, (B, ...) each, as ``velocity`` takes them; the last prompts' are kept."""
        missing = [p for p in dict.fromkeys(prompts) if p not in self._conditions]
        for index in blocks(len(missing), 8, 8):
            part = [missing[i] for i in index]
            conditions = self.model.encode(part, self._max_sequence_length)
            # Copies: a row of a block would keep the whole block, and all but one of its rows may be to fill it up.
            copies = (tuple(x.clone() for x in row) for row in zip(*conditions, strict=True))
            self._conditions.update(zip(part, copies, strict=True))
        if missing:
            self._put_aside()
            self._warn_of_cut(missing)
        rows = [self._conditions[p] for p in prompts]
        while len(self._conditions) * sum(x.nbytes for x in rows[0]) > KEPT_BYTES:
            self._conditions.pop(next(iter(self._conditions)))
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def _warn_of_cut(self, prompts: list[str]) -> None:
        """Name, once for all, a prompt that is longer than what is encoded of it."""
        if not self._warned and (cut := self.model.too_long(prompts, self._max_sequence_length)):
            self._warned = True
            limit = f"max_sequence_length={self._max_sequence_length}"
            prompt = cut[0] if len(cut[0]) <= 200 else f"{cut[0][:200]} ..."
            say(
                f"prompts: {prompt!r} has more than {limit} tokens, and counts no further; others may, too",
                style="yellow",
            )

    def _put_aside(self) -> None:
        """Have what is offloaded wait in host memory again."""
        for hook in self._waiting:
            hook.offload()

    def velocity(self, x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """v(x_t, t) of the adapter in use in the pipeline's dtype; t (B,) in [0, 1], never rounded to an integer."""
        inputs = (x_t.to(self.dtype), t, *conditions)
        evaluate = partial(self.model.velocity, self._forward)
        if self._graphs is not None:
            trains = torch.is_grad_enabled() and self._evaluated == "default"
            return self._graphs((self._evaluated, trains), evaluate, inputs, self.trained if trains else ())
        v = evaluate(*inputs)
        # torch.compile's CUDA graph writes its next result over this one, which a multistep solver still needs.
        return v if self._forward is self.transformer else v.clone()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one sample's latents."""
        return self.model.latent_shape(self._resolution)

    def times(self, steps: int) -> Tensor:
        """``steps`` + 1 times from 1 to 0 as the pipeline's scheduler shifts and spaces them."""
        last = self.model.last if self._spacing == "pipeline" else None
        return times(steps, self.model.shift(self._resolution), self.model.terminal, last)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) uint8 of clean latents."""
        size = decoded_together(self.model, latents.shape[1:])
        decoded = torch.cat([self.model.decode(latents[index]) for index in blocks(len(latents), size, size)])
        self._put_aside()
        pictures = (decoded[: len(latents)].float() / 2 + 0.5).clamp(0, 1) * 255
        return pictures.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def save_adapter(self, adapter: str, folder: Path | None) -> None:
        """Write one adapter in PEFT's format. A process without a folder helps the others to put together what is
        sharded, as adapters never are."""
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lora.save_pretrained(folder)
        # PEFT has the layers in a set, whose order differs from process to process.
        settings = json.loads((path := folder / "adapter_config.json").read_text())
        path.write_text(json.dumps(settings | {"target_modules": sorted(settings["target_modules"])}, indent=2))
        state = get_peft_model_state_dict(self.transformer, adapter_name=adapter)
        # As a PeftModel names them.
        save_file({f"base_model.model.{k}": v.contiguous() for k, v in state.items()}, folder / ADAPTER)

    def load_adapter(self, adapter: str, folder: Path) -> None:
        """Read one adapter that ``save_adapter`` wrote, or another of the same layers in PEFT's or diffusers' format.

        Raises:
            OSError, ValueError: files that are missing or damaged, or an adapter of other layers, or of layers of
                another size.
        """
        path = find_weights(folder)
        self._set_adapter(adapter, path, lora_layers(path))

    def _set_adapter(self, adapter: str, path: Path, layers: Layers) -> None:
        """Set one adapter to the layers that a file has."""
        state = named_weights(layers)
        shapes = {name: weight.shape for name, weight in state.items()}
        check_fit(path, shapes, get_peft_model_state_dict(self.transformer, adapter_name=adapter))
        set_peft_model_state_dict(self.transformer, state, adapter_name=adapter)
