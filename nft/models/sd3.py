"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from nft_kernels.models.sd3 import accelerate

from .base import Model


class StableDiffusion3(Model):
    """Conditions are the prompt's embeddings (B, L, D) and the pooled ones (B, P)."""

    pipeline_class = StableDiffusion3Pipeline
    transformer_class = SD3Transformer2DModel
    longest = 512
    tokenizer = "tokenizer_3"
    fast_path = staticmethod(accelerate)

    def conditions(self, batch: int, max_length: int) -> tuple[Tensor, ...]:
        config = self.transformer.config
        # CLIP's tokens come before T5's.
        tokens = self.pipeline.tokenizer_max_length + max_length
        return (
            torch.empty(batch, tokens, config.joint_attention_dim, dtype=self.transformer.dtype, device="meta"),
            torch.empty(batch, config.pooled_projection_dim, dtype=self.transformer.dtype, device="meta"),
        )

    def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, ...]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.transformer.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_length,
        )
        return embeds, pooled

    def velocity(self, forward: Callable[..., Any], x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        return forward(x_t, *conditions, 1000 * t, return_dict=False)[0]

    def latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        config = self.transformer.config
        size = resolution // self.pipeline.vae_scale_factor if resolution else config.sample_size
        return config.in_channels, size, size

    @property
    def last(self) -> float:
        # The smallest that it was trained on, which a constant shift has moved already and moves again.
        return self.pipeline.scheduler.sigma_min

    @property
    def patch(self) -> int:
        return self.transformer.config.patch_size

    @property
    def largest(self) -> int:
        return self.unit * self.transformer.config.pos_embed_max_size
