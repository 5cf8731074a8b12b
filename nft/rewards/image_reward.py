"""ImageReward (Xu et al., arXiv 2304.05977) on transformers' BLIP classes."""

from __future__ import annotations

import json
import math
import re
from types import MappingProxyType

import torch
from torch import Tensor

from .base import Metadata, Reward, Scored, from_hub
from .clip import checkpoint_file, linear_head

MODEL, TOKENIZER = "zai-org/ImageReward", "google-bert/bert-base-uncased"
# Mean and deviation of the raw reward on the authors' validation set.
_MEAN, _DEVIATION = 0.16717362830052426, 1.0333394966054072
_TOKENS = 35
_HEAD_WIDTH = 64

_VISION = [
    (r"^blocks\.", "encoder.layers."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"^norm\.", "post_layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^cls_token$", "embeddings.class_embedding"),
]


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _rename(name: str) -> str:
    for pattern, replacement in _VISION:
        name = re.sub(pattern, replacement, name)
    return name


class ImageReward(Reward):
    """ImageReward: a head on the text's first token, read with cross-attention to the picture; standardised."""

    packages = ("transformers",)
    extra = "train"
    uses_device = threaded = True
    weights = MappingProxyType({MODEL: "ImageReward.pt", TOKENIZER: "tokenizer_config.json"})

    def __init__(self, model: str = MODEL, tokenizer: str = TOKENIZER, *, device: str | torch.device = "cpu"):
        """Load the published checkpoint into BLIP.

        Args:
            model: hub name or folder with ``ImageReward.pt`` and ``med_config.json``.
            tokenizer: hub name or folder of BERT's tokenizer.
            device: where to run.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
        """
        from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, CLIPImageProcessor
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.device = torch.device(device)
        state = torch.load(checkpoint_file(model, "ImageReward.pt"), map_location="cpu", weights_only=True)
        text = json.loads(checkpoint_file(model, "med_config.json").read_text())
        vision = {_rename(name): value for name, value in _part(state, "blip.visual_encoder.").items()}
        width, _, _, patch = vision["embeddings.patch_embedding.weight"].shape
        side = math.isqrt(vision["embeddings.position_embedding"].shape[1] - 1) * patch
        layers = {name.split(".")[2] for name in vision if name.startswith("encoder.layers.")}
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=width,
                intermediate_size=vision["encoder.layers.0.mlp.fc1.weight"].shape[0],
                num_hidden_layers=len(layers),
                num_attention_heads=width // _HEAD_WIDTH,
                image_size=side,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        self.vision.load_state_dict(vision)
        shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        more = ("layer_norm_eps", "max_position_embeddings", "hidden_act")
        config = {name: text[name] for name in (*shared, *more) if name in text}
        # Its authors added tokens to BERT's after the configuration was written.
        config["vocab_size"] = len(state["blip.text_encoder.embeddings.word_embeddings.weight"])
        self.text = BlipTextModel(BlipTextConfig(**config, encoder_hidden_size=width), add_pooling_layer=False)
        text_state = _part(state, "blip.text_encoder.")
        text_state.pop("embeddings.position_ids", None)
        self.text.load_state_dict(text_state)
        self.head = linear_head(_part(state, "mlp.layers."), self.device)
        for part in (self.vision, self.text):
            part.eval().to(self.device)
        self.tokenizer = from_hub(AutoTokenizer.from_pretrained, tokenizer)
        self.processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        images = list(pictures.permute(0, 3, 1, 2).cpu())
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        image = self.vision(pixels.to(self.device)).last_hidden_state
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=_TOKENS, return_tensors="pt"
        ).to(self.device)
        x = self.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=image,
            encoder_attention_mask=image.new_ones(image.shape[:2], dtype=torch.long),
        ).last_hidden_state[:, 0]
        raw = self.head(x)[:, 0]
        return Scored((raw - _MEAN) / _DEVIATION, {"raw": raw})
