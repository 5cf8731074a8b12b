"""The policy: a Stable Diffusion 3 pipeline with the LoRA adapters ``default`` (trained) and ``old`` (rollouts)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import Config, usable_device

SHAPES_PIPELINE = Path(__file__).parent / "worlds" / "shapes" / "pipeline"

# The eight attention projections of the joint attention, as in the paper's appendix.
TARGETS = [
    f"attn.{name}"
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
]


def old_policy_decay(schedule: str, step: int) -> float:
    """eta of theta_old <- eta theta_old + (1-eta) theta at optimizer phase ``step``."""
    if schedule == "copy":
        return 0.0
    if schedule == "linear_0.5":
        return min(0.001 * step, 0.5)
    if schedule == "delayed_0.999":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    raise ValueError(f"schedule: got {schedule!r}, accepted are copy, linear_0.5, delayed_0.999")


class Policy:
    """Velocities under a chosen adapter, prompt embeddings and decoding of one pipeline."""

    def __init__(self, config: Config):
        """Load the pipeline (hub name, folder, or ``shapes``) and add both adapters, equal and without effect.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
            ValueError: a device that this machine lacks, or a resolution that the transformer does not take.
        """
        pipeline = config.pipeline
        source = str(SHAPES_PIPELINE) if pipeline == "shapes" else pipeline
        self.dtype = getattr(torch, config.dtype)
        try:
            # The index alone tells a wrong name; the device is checked before gigabytes are read.
            StableDiffusion3Pipeline.load_config(source)
            self.device = usable_device(config.device)
            self.pipeline = StableDiffusion3Pipeline.from_pretrained(source, torch_dtype=self.dtype)
        except OSError as error:
            hint = (
                "the bundled pipeline is missing: make it with `nft pretrain FOLDER` and set pipeline=FOLDER"
                if pipeline == "shapes"
                else "it is neither a folder with a saved pipeline nor a reachable hub name: accept the model's "
                "licence and run `hf download`, or give a folder"
            )
            raise FileNotFoundError(f"pipeline: got {pipeline!r}, {hint}") from error
        self.pipeline.set_progress_bar_config(disable=True)
        self.transformer = self.pipeline.transformer
        unit = self.pipeline.vae_scale_factor * self.transformer.config.patch_size
        largest = unit * self.transformer.config.pos_embed_max_size
        if config.resolution and (config.resolution % unit or config.resolution > largest):
            raise ValueError(f"resolution: got {config.resolution}, accepted are multiples of {unit} up to {largest}")
        for module in (self.transformer, self.pipeline.vae, self.pipeline.text_encoder, self.pipeline.text_encoder_2):
            module.requires_grad_(False).eval()
        if self.pipeline.text_encoder_3 is not None:
            self.pipeline.text_encoder_3.requires_grad_(False).eval()
        self.pipeline.to(self.device)
        # Half precision shows in decoded pictures.
        self.pipeline.vae.to(torch.float32)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self._add_adapters(config)
        self.update_old(0.0)
        self._resolution = config.resolution
        self._max_sequence_length = config.max_sequence_length
        self._embeddings: dict[str, tuple[Tensor, Tensor]] = {}
        self.use("default")

    def _add_adapters(self, config: Config) -> None:
        """What is trained, and its copy that samples."""
        self.lora = LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian", target_modules=TARGETS
        )
        for name in ("default", "old"):
            self.transformer.add_adapter(self.lora, adapter_name=name)
        self.trained = self._adapter_parameters("default")
        self._old = self._adapter_parameters("old")
        # Small updates would vanish in half-precision weights.
        for parameter in (*self.trained, *self._old):
            parameter.data = parameter.data.float()

    def _adapter_parameters(self, adapter: str) -> list[torch.nn.Parameter]:
        return [p for name, p in self.transformer.named_parameters() if f".{adapter}." in name]

    def use(self, adapter: str | None) -> None:
        """Choose the adapter of the next evaluations; None is the reference model."""
        if adapter is None:
            self.transformer.disable_adapters()
            return
        self.transformer.enable_adapters()
        self.transformer.set_adapter(adapter)
        # Choosing an adapter makes it trainable; only ``default`` ever is.
        for parameter in self.trained:
            parameter.requires_grad_(adapter == "default")
        for parameter in self._old:
            parameter.requires_grad_(False)

    @contextmanager
    def merged(self, adapter: str) -> Iterator[None]:
        """Evaluate with an adapter's product added to copies of the adapted weights, which saves its two extra matrix
        products a layer. The sum is taken in float32; the base weights themselves are set aside and put back."""
        self.use(None)
        layers = [layer for layer in self.transformer.modules() if isinstance(layer, LoraLayer)]
        base = [layer.base_layer.weight.data for layer in layers]
        try:
            for layer, weight in zip(layers, base, strict=True):
                layer.base_layer.weight.data = (weight.float() + layer.get_delta_weight(adapter)).to(weight.dtype)
            yield
        finally:
            for layer, weight in zip(layers, base, strict=True):
                layer.base_layer.weight.data = weight
            self.use("default")

    @torch.no_grad()
    def update_old(self, decay: float) -> None:
        """theta_old <- decay theta_old + (1-decay) theta."""
        for old, new in zip(self._old, self.trained, strict=True):
            old.lerp_(new, 1 - decay)
        self.old_is_current = decay == 0

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompt embeddings (B, L, D) and pooled embeddings (B, P); every distinct prompt is encoded once.

        And alone: the last bits of a matrix product depend on its batch, and what was encoded together with a prompt
        would depend on when a run was resumed and on the number of processes.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeddings:
                embeds, _, pooled, _ = self.pipeline.encode_prompt(
                    [prompt],
                    None,
                    None,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self._max_sequence_length,
                )
                self._embeddings[prompt] = (embeds[0], pooled[0])
        rows = [self._embeddings[p] for p in prompts]
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def velocity(self, x_t: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """v(x_t, t) of the adapter in use in the pipeline's dtype; t (B,) in [0, 1], never rounded to an integer."""
        return self.transformer(x_t.to(self.dtype), embeds, pooled, 1000 * t, return_dict=False)[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one sample's latents."""
        config = self.transformer.config
        size = self._resolution // self.pipeline.vae_scale_factor if self._resolution else config.sample_size
        return config.in_channels, size, size

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) uint8 of clean latents, decoded 64 at a time."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pictures = torch.cat([vae.decode(part).sample for part in latents.split(64)])
        return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def save_adapter(self, adapter: str, folder: Path) -> None:
        """Write one adapter in PEFT's format."""
        folder.mkdir(parents=True, exist_ok=True)
        self.lora.save_pretrained(folder)
        state = get_peft_model_state_dict(self.transformer, adapter_name=adapter)
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "adapter_model.safetensors")

    @staticmethod
    def find_adapter(folder: Path) -> Path:
        """The folder of the trained adapter in a run, a checkpoint, or itself.

        Raises:
            FileNotFoundError: none of these.
        """
        for candidate in (folder, folder / "default", folder / "checkpoint" / "default"):
            if (candidate / "adapter_model.safetensors").is_file():
                return candidate
        raise FileNotFoundError(
            f"checkpoint: got {str(folder)!r}, accepted is a run, its checkpoint, or a LoRA folder in PEFT's format"
        )

    def load_adapter(self, adapter: str, folder: Path) -> None:
        """Read one adapter that ``save_adapter`` wrote."""
        set_peft_model_state_dict(
            self.transformer, load_file(folder / "adapter_model.safetensors"), adapter_name=adapter
        )
