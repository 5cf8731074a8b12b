"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from torch.nn.functional import pad

from .base import Model, pack, unpack


class QwenImage(Model):
    """Conditions are the prompt's embeddings (B, L, D), filled up to one length, and which of them count (B, L)."""

    pipeline_class = QwenImagePipeline
    transformer_class = QwenImageTransformer2DModel
    longest = 1024
    recordable = False  # diffusers makes a tensor of the text's length at every forward

    @staticmethod
    def vae_scale_factor(vae: Mapping[str, Any]) -> int:
        return 2 ** len(vae["temperal_downsample"])

    @staticmethod
    def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """As diffusers' pipeline has it: every token's velocity has the norm that it has without guidance."""
        v, v_uncond = pack(conditional.float()), pack(unconditional.float())
        guided = v_uncond + scale * (v - v_uncond)
        guided *= v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return unpack(guided, *conditional.shape[-2:])

    def conditions(self, batch: int, max_length: int) -> tuple[Tensor, ...]:
        width = self.transformer.config.joint_attention_dim
        return (
            torch.empty(batch, max_length, width, dtype=self.transformer.dtype, device="meta"),
            torch.empty(batch, max_length, dtype=torch.bool, device="meta"),
        )

    def encode(self, prompts: list[str], max_length: int) -> tuple[Tensor, ...]:
        embeds, mask = self.pipeline.encode_prompt(
            prompts, device=self.transformer.device, max_sequence_length=max_length
        )
        if mask is None:
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        missing = max_length - embeds.shape[1]
        return pad(embeds, (0, 0, 0, missing)), pad(mask.bool(), (0, missing))

    def velocity(self, forward: Callable[..., Any], x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        embeds, mask = conditions
        height, width = x_t.shape[-2:]
        v = forward(
            hidden_states=pack(x_t),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=t,
            img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(v, height, width)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            latents.new_tensor(values).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        # The VAE is one of videos; a picture is a single frame.
        return vae.decode((latents * std + mean).to(vae.dtype)[:, :, None]).sample[:, :, 0]
