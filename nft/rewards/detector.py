"""GenEval's detector (Ghosh et al., arXiv 2310.11513) on transformers: Mask2Former for objects, CLIP for colours.

The benchmark's own pipeline needs mmdet and mmcv; the same network is available as
facebook/mask2former-swin-small-coco-instance.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nft.data.geneval import CLASSES, COLORS

from .base import Metadata, Reward, Scored, from_hub
from .clip import CLIP_L
from .geneval import MAX_OBJECTS, THRESHOLD, Detection, Verdict, check_entry, counted, judge

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
_COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY = 153


class GenEvalReward(Reward):
    """The published training score of pictures against GenEval metadata; the details are both rules' verdicts.

    A score falls below 0 where far too many objects were drawn: 16 where one was asked give -14.
    """

    range = (-(MAX_OBJECTS - 2.0), 1.0)
    needs = ("tag", "include")
    packages = ("transformers", "scipy")
    extra = "train"
    uses_device = threaded = True
    weights = MappingProxyType({DETECTOR: "config.json", CLIP_L: "config.json"})

    @staticmethod
    def check_prompt(prompt: str, entry: dict[str, Any]) -> None:
        check_entry(entry, CLASSES, COLORS)

    def __init__(self, detector: str = DETECTOR, clip: str = CLIP_L, *, device: torch.device | str = "cpu"):
        """Load both networks from a hub name or a folder.

        Raises:
            FileNotFoundError: weights that are neither on disk nor reachable.
        """
        from transformers import AutoImageProcessor, AutoProcessor, CLIPModel, Mask2FormerForUniversalSegmentation

        self.device = torch.device(device)
        self.detector = from_hub(Mask2FormerForUniversalSegmentation.from_pretrained, detector).eval().to(self.device)
        self.detector_processor = from_hub(AutoImageProcessor.from_pretrained, detector)
        self.clip = from_hub(CLIPModel.from_pretrained, clip).eval().to(self.device)
        self.clip_processor = from_hub(AutoProcessor.from_pretrained, clip)
        self._color_texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def _color_directions(self, name: str) -> Tensor:
        """Unit text embeddings (colours, D) of one class, averaged over the three templates."""
        if name not in self._color_texts:
            texts = [p.format(color=color, name=name) for color in COLORS for p in _COLOR_PROMPTS]
            inputs = self.clip_processor(text=texts, return_tensors="pt", padding=True).to(self.device)
            embedded = self.clip.get_text_features(**inputs).pooler_output
            embedded = torch.nn.functional.normalize(embedded, dim=-1).view(len(COLORS), len(_COLOR_PROMPTS), -1)
            self._color_texts[name] = torch.nn.functional.normalize(embedded.mean(1), dim=-1)
        return self._color_texts[name]

    @torch.no_grad()
    def _color(self, picture: np.ndarray, mask: np.ndarray, box: tuple[int, ...], name: str) -> str:
        masked = np.where(mask[..., None], picture, _GREY).astype(np.uint8)
        left, top, right, bottom = box
        crop = Image.fromarray(masked[top:bottom, left:right])
        inputs = self.clip_processor(images=crop, return_tensors="pt").to(self.device)
        embedded = self.clip.get_image_features(**inputs).pooler_output
        return COLORS[int((self._color_directions(name) @ embedded[0]).argmax())]

    @torch.no_grad()
    def detect(self, pictures: Tensor, entries: list[dict[str, Any]]) -> list[list[Detection]]:
        """Detections in uint8 pictures (B, H, W, 3) of the classes that each entry speaks of."""
        images = [Image.fromarray(picture) for picture in pictures.cpu().numpy()]
        inputs = self.detector_processor(images=images, return_tensors="pt").to(self.device)
        results = self.detector_processor.post_process_instance_segmentation(
            self.detector(**inputs),
            threshold=THRESHOLD,
            target_sizes=[image.size[::-1] for image in images],
            return_binary_maps=True,
        )
        return [
            self._read(np.asarray(image), result, entry)
            for image, result, entry in zip(images, results, entries, strict=True)
        ]

    def _read(self, picture: np.ndarray, result: dict[str, Any], entry: dict[str, Any]) -> list[Detection]:
        wanted: dict[str, bool] = {}
        for item in (*entry["include"], *entry.get("exclude", ())):
            wanted[item["class"]] = wanted.get(item["class"], False) or "color" in item
        found: list[Detection] = []
        for name, colored in wanted.items():
            segments = [s for s in result["segments_info"] if CLASSES[s["label_id"]] == name]
            masks = [result["segmentation"][s["id"]].cpu().numpy() > 0 for s in segments]
            # An empty mask is no object.
            scores = [s["score"] if mask.any() else 0.0 for s, mask in zip(segments, masks, strict=True)]
            for i in counted(scores, entry["tag"]):
                rows, columns = np.flatnonzero(masks[i].any(1)), np.flatnonzero(masks[i].any(0))
                box = (columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1)
                color = self._color(picture, masks[i], box, name) if colored else None
                found.append(Detection(name, box, scores[i], color))
        return found

    def verdicts(self, pictures: Tensor, entries: list[dict[str, Any]]) -> list[Verdict]:
        """Every picture judged by the rules of ``nft.rewards.geneval``."""
        return [judge(found, entry) for found, entry in zip(self.detect(pictures, entries), entries, strict=True)]

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        verdicts = self.verdicts(pictures, metadata)
        details = {name: torch.tensor([getattr(v, name) for v in verdicts]) for name in ("strict", "correct")}
        return Scored(torch.tensor([v.partial for v in verdicts]), details)
