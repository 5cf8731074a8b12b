"""What the policy has to know about one kind of pipeline."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from nft_kernels.models.vae import accelerate

# The eight projections of the joint attention, as in DiffusionNFT's appendix (arXiv 2509.16117). Some blocks have less.
JOINT_ATTENTION = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]
# They change the times or the steps of diffusers' own call, and ours would be others.
_UNKNOWN_TIMES = (
    "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling",
)  # fmt: skip


def left_out(source: str) -> dict[str, None]:
    """The components that a pipeline was saved without, such as Stable Diffusion 3's T5: diffusers loads it only where
    they are given as None once more."""
    index = DiffusionPipeline.load_config(source)
    return {name: None for name, component in index.items() if component == [None, None]}


def _prepare(vae: nn.Module) -> None:
    if isinstance(vae, AutoencoderKL):
        vae.to(memory_format=torch.channels_last)
        # Beyond the size that it was trained on, a picture is decoded in overlapping tiles.
        vae.enable_tiling()
        accelerate(vae)


class Model(ABC):
    """One pipeline, frozen. Whatever its transformer takes, outside are latents (B, C, H, W), t = 1 is noise, and
    v = eps - x0."""

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    transformer_class: ClassVar[type[ModelMixin]]
    targets: list[str] | str = JOINT_ATTENTION
    """Ends of the names of the layers that LoRA adapts, or a pattern of whole names."""
    fast_path: ClassVar[Callable[..., Any] | None] = None
    """What ``fused_transformer`` puts in place of the transformer's forward."""
    guide: ClassVar[Callable[..., Tensor] | None] = None
    """The velocity that classifier-free guidance makes of a conditional one, an unconditional one and a scale, where
    that is not v_u + scale (v_c - v_u)."""
    tokenizer: ClassVar[str] = "tokenizer"
    """The pipeline's tokenizer of the encoder whose tokens ``max_sequence_length`` counts."""
    longest: ClassVar[int] = 4096
    """The largest ``max_sequence_length`` that the pipeline takes."""
    recordable: ClassVar[bool] = True
    """Whether ``cuda_graphs`` can record an evaluation, which may make no tensor of numbers that Python holds."""

    def __init__(self, source: str, dtype: torch.dtype):
        """Load the pipeline from a folder or the hub.

        Raises:
            OSError: weights that are neither on disk nor reachable.
        """
        self.pipeline = self.pipeline_class.from_pretrained(source, dtype=dtype, **left_out(source))
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer = self.pipeline.transformer
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        _prepare(self.pipeline.vae)

    @classmethod
    def outline(
        cls, settings: Mapping[str, Any], dtype: torch.dtype, vae: Mapping[str, Any] | None = None, **pipeline: Any
    ) -> Model:
        """The model without weights, for evaluations of shapes alone: a transformer of these ``settings`` on the meta
        device, beside it a VAE if its settings are given, and of its pipeline the attributes given."""
        model = cls.__new__(cls)
        model.pipeline = SimpleNamespace(**pipeline)
        with torch.device("meta"):
            model.transformer = cls.transformer_class.from_config(settings).to(dtype)
            if vae is not None:
                model.pipeline.vae = getattr(diffusers, vae["_class_name"]).from_config(vae).to(dtype)
                model.pipeline.vae_scale_factor = cls.vae_scale_factor(vae)
                _prepare(model.pipeline.vae)
        return model

    @classmethod
    def read_outline(cls, source: str, dtype: torch.dtype, **pipeline: Any) -> Model:
        """The ``outline`` of a pipeline in a folder or on the hub, of which nothing but settings is read.

        Raises:
            OSError: settings that are neither on disk nor reachable.
        """
        settings = cls.transformer_class.load_config(source, subfolder="transformer")
        return cls.outline(settings, dtype, AutoencoderKL.load_config(source, subfolder="vae"), **pipeline)

    @classmethod
    def check_scheduler(cls, name: str, settings: Mapping[str, Any]) -> None:
        """Whether the times of a scheduler, by its class and settings, are those of ``shift``, ``terminal`` and
        ``last``, and its steps Euler's.

        Raises:
            ValueError: others.
        """
        found = [name, *(f"{key}=true" for key in _UNKNOWN_TIMES if settings.get(key))]
        if found != [own := FlowMatchEulerDiscreteScheduler.__name__]:
            accepted = f"{own} without {', '.join(_UNKNOWN_TIMES)}"
            raise ValueError(f"pipeline: got the scheduler {' with '.join(found)}, accepted is {accepted}")

    @staticmethod
    def vae_scale_factor(vae: Mapping[str, Any]) -> int:
        """Pixels to a side of one of the latents' elements, by the VAE's settings."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    @abstractmethod
    def conditions(self, batch: int, max_length: int) -> tuple[Tensor, ...]:
        """Tensors of the shapes and dtypes that ``encode`` gives, on the meta device."""

    @abstractmethod
    def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, ...]:
        """The transformer's conditions, each (B, ...), with shapes that do not depend on the prompts."""

    def too_long(self, prompts: list[str], max_length: int) -> list[str]:
        """Those that have more tokens than are encoded."""
        tokenizer = getattr(self.pipeline, self.tokenizer, None)
        if tokenizer is None or not prompts:
            return []
        counts = map(len, tokenizer(prompts).input_ids)
        return [prompt for prompt, count in zip(prompts, counts, strict=True) if count > max_length]

    @abstractmethod
    def velocity(self, forward: Callable[..., Any], x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """v(x_t, t) of ``forward``, which is the transformer or what stands for it; t (B,) in [0, 1]."""

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        """Channels, height and width of a picture's latents; the pipeline's own size for None."""
        size = resolution // self.pipeline.vae_scale_factor if resolution else self.pipeline.default_sample_size
        # The transformer's channels are those of a whole patch.
        return self.transformer.config.in_channels // self.patch**2, size, size

    @property
    def patch(self) -> int:
        """Side of the latents' patch that is one token."""
        return 2

    @property
    def unit(self) -> int:
        """What a resolution is a multiple of, in pixels."""
        return self.pipeline.vae_scale_factor * self.patch

    @property
    def largest(self) -> int | None:
        """The largest resolution in pixels, if there is one."""
        return None

    def shift(self, resolution: int | None) -> float:
        """The s of t <- s t / (1 + (s-1) t) by which the pipeline's scheduler shifts its times at this resolution."""
        c = self.pipeline.scheduler.config
        if not c.get("use_dynamic_shifting"):
            return c.shift
        _, height, width = self.latent_shape(resolution)
        tokens = height * width // self.patch**2
        mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        return math.exp(mu) if c.time_shift_type == "exponential" else mu

    @property
    def terminal(self) -> float | None:
        """The last time above 0 to which the scheduler stretches its times."""
        return self.pipeline.scheduler.config.get("shift_terminal")

    @property
    def last(self) -> float | None:
        """The last time above 0 before the shift, where diffusers' pipeline leaves the times to its scheduler; None
        where it spaces them evenly between 1 and 0 itself."""
        return None

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] of clean latents."""
        vae = self.pipeline.vae
        latents = (latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).to(vae.dtype)
        return vae.decode(latents.contiguous(memory_format=torch.channels_last)).sample


def check_resolution(resolution: int | None, unit: int, largest: int | None) -> None:
    """Compare a resolution, if one is set, with what it is a multiple of and the largest one there is, all in pixels.

    Raises:
        ValueError: one that does not fit.
    """
    if resolution and (resolution % unit or (largest and resolution > largest)):
        limit = f" up to {largest}" if largest else ""
        raise ValueError(f"resolution: got {resolution}, accepted are multiples of {unit}{limit}")


def pack(x: Tensor) -> Tensor:
    """(B, C, H, W) as one token for every 2 x 2 patch: (B, H/2 W/2, 4 C), channels slowest."""
    return pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack`` for latents of ``height`` and ``width``."""
    return pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)
