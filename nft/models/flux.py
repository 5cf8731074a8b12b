"""FLUX.1, guidance-distilled (dev) and not (schnell)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from .base import Model, pack, unpack


class Flux(Model):
    """Conditions are T5's embeddings (B, L, D) and CLIP's pooled ones (B, P)."""

    pipeline_class = FluxPipeline
    transformer_class = FluxTransformer2DModel
    longest = 512
    tokenizer = "tokenizer_2"
    guidance = 3.5
    """Scale of the distilled guidance, the pipeline's default."""

    def conditions(self, batch: int, max_length: int) -> tuple[Tensor, ...]:
        config = self.transformer.config
        return (
            torch.empty(batch, max_length, config.joint_attention_dim, dtype=self.transformer.dtype, device="meta"),
            torch.empty(batch, config.pooled_projection_dim, dtype=self.transformer.dtype, device="meta"),
        )

    def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, ...]:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.transformer.device, max_sequence_length=max_length
        )
        return embeds, pooled

    def velocity(self, forward: Callable[..., Any], x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        embeds, pooled = conditions
        height, width = x_t.shape[-2:]
        # Of a token's three rotary positions a picture uses row and column, and text none.
        ranges = [torch.arange(n, device=x_t.device, dtype=torch.float32) for n in (1, height // 2, width // 2)]
        distilled = self.transformer.config.guidance_embeds
        v = forward(
            hidden_states=pack(x_t),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=t,
            img_ids=torch.cartesian_prod(*ranges),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=x_t.device),
            guidance=torch.full_like(t, self.guidance) if distilled else None,
            return_dict=False,
        )[0]
        return unpack(v, height, width)
