"""Rewards on CLIP in transformers' classes: PickScore, CLIPScore, HPSv2.1 and Aesthetic.

Every one loads by hub name or folder. Pictures go through the checkpoint's own image processor.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .base import Metadata, Reward, Scored, from_hub

CLIP_L = "openai/clip-vit-large-patch14"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPS, HPS_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
AESTHETIC_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
AESTHETIC_SOURCE = "https://github.com/christophschuhmann/improved-aesthetic-predictor"


class CLIP(Reward):
    """Unit embeddings of pictures and prompts."""

    packages = ("transformers",)
    extra = "train"
    uses_device = threaded = True
    weights = MappingProxyType({CLIP_L: "config.json"})

    def __init__(self, model: str = CLIP_L, processor: str | None = None, *, device: str | torch.device = "cpu"):
        """Load a CLIP model and its processor, by hub name or folder.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
        """
        from transformers import AutoProcessor, CLIPModel

        self.device = torch.device(device)
        self.model = from_hub(CLIPModel.from_pretrained, model).eval().to(self.device)
        self.processor = from_hub(AutoProcessor.from_pretrained, processor or model)

    def _inputs(self, **what: Any) -> dict[str, Tensor]:
        return self.processor(**what, return_tensors="pt").to(self.device)

    @torch.no_grad()
    def embed(self, pictures: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, D) of the pictures and of the prompts, which are cut to 77 tokens."""
        images = list(pictures.permute(0, 3, 1, 2).cpu())
        length = {"padding": "max_length", "truncation": True, "max_length": 77}
        out = self.model(**self._inputs(images=images, text=prompts, **length))
        return out.image_embeds, out.text_embeds

    def cosine(self, pictures: Tensor, prompts: list[str]) -> Tensor:
        """Cosine similarity (B,) of every picture and its prompt."""
        images, texts = self.embed(pictures, prompts)
        return (images * texts).sum(-1)


class CLIPScore(CLIP):
    """Cosine similarity of picture and prompt in CLIP ViT-L/14.

    Hessel et al., arXiv 2104.08718, without its factor of 2.5 and its clipping at 0.
    """

    range = (-1.0, 1.0)

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        return Scored(self.cosine(pictures, prompts), {})


class PickScore(CLIP):
    """PickScore (Kirstain et al., arXiv 2305.01569) / 26: the scaled cosine similarity in a fine-tuned CLIP ViT-H/14.

    The divisor is Flow-GRPO's; the detail is the score as its authors give it.
    """

    weights = MappingProxyType({PICKSCORE: "config.json", CLIP_H: "preprocessor_config.json"})

    def __init__(self, model: str = PICKSCORE, processor: str = CLIP_H, *, device: str | torch.device = "cpu"):
        super().__init__(model, processor, device=device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        raw = self.model.logit_scale.exp() * self.cosine(pictures, prompts)
        return Scored(raw / 26, {"pickscore": raw})


_OPEN_CLIP = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.ln_1\.", ".layer_norm1."),
    (r"\.ln_2\.", ".layer_norm2."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
]


def convert_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP state dict in open_clip's names under those of transformers' ``CLIPModel``."""
    converted = {}
    for name, value in state.items():
        if name.endswith(("visual.proj", "text_projection")):
            value = value.T
        for pattern, replacement in _OPEN_CLIP:
            name = re.sub(pattern, replacement, name)
        packed = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if packed is None:
            converted[name] = value
            continue
        for which, part in zip("qkv", value.chunk(3), strict=True):
            converted[f"{packed[1]}.self_attn.{which}_proj.{packed[2]}"] = part
    return converted


def checkpoint_file(source: str, filename: str) -> Path:
    """A file in a folder or a hub repository."""
    if Path(source).is_dir():
        path = Path(source) / filename
        if not path.is_file():
            raise FileNotFoundError(f"reward weights: {source!r} holds no {filename}")
        return path
    from huggingface_hub import hf_hub_download

    return Path(from_hub(lambda name: hf_hub_download(name, filename), source))


def linear_head(state: dict[str, Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The linear layers of a state dict, one after another in the order of the numbers in their names."""
    names = sorted((k for k in state if k.endswith(".weight")), key=lambda k: int(re.findall(r"\d+", k)[0]))
    layers = [(state[k].to(device), state[k.removesuffix("weight") + "bias"].to(device)) for k in names]

    def head(x: Tensor) -> Tensor:
        for weight, bias in layers:
            x = torch.nn.functional.linear(x, weight, bias)
        return x

    return head


class HPSv2(CLIPScore):
    """HPS v2.1 (Wu et al., arXiv 2306.09341): the cosine similarity in a fine-tuned CLIP ViT-H/14.

    For pictures that are not square its authors pad where this reward crops the centre.
    """

    weights = MappingProxyType({HPS: HPS_FILE, CLIP_H: "config.json"})

    def __init__(
        self, model: str = HPS, clip: str = CLIP_H, filename: str = HPS_FILE, *, device: str | torch.device = "cpu"
    ):
        """Put the published weights, in open_clip's names, into the CLIP they were tuned from.

        Args:
            model: hub name or folder with ``filename``.
            clip: hub name or folder of the CLIP ViT-H/14 that gives architecture and processor.
            device: where to run.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
        """
        super().__init__(clip, device=device)
        state = torch.load(checkpoint_file(model, filename), map_location="cpu", weights_only=True)["state_dict"]
        self.model.load_state_dict(convert_open_clip(state))


class Aesthetic(CLIP):
    """A linear head on the unit embedding of CLIP ViT-L/14 (LAION's improved aesthetic predictor), about 1 to 10.

    The published head is five linear layers without activations between them; one layer is as good.
    """

    files = MappingProxyType({AESTHETIC_HEAD: AESTHETIC_SOURCE})

    def __init__(self, head: str = AESTHETIC_HEAD, model: str = CLIP_L, *, device: str | torch.device = "cpu"):
        """Load CLIP and the head.

        Args:
            head: file with the head's state dict.
            model: hub name or folder of the CLIP.
            device: where to run.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
        """
        if not Path(head).is_file():
            raise FileNotFoundError(
                f"aesthetic head: no file {head!r}: download {AESTHETIC_HEAD} from {AESTHETIC_SOURCE}"
            )
        super().__init__(model, device=device)
        state = torch.load(head, map_location="cpu", weights_only=True)
        self.head = linear_head(state, self.device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        inputs = self._inputs(images=list(pictures.permute(0, 3, 1, 2).cpu()))
        x = torch.nn.functional.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
        return Scored(self.head(x)[:, 0], {})
