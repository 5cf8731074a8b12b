"""How small a picture's JPEG file is (Black et al., arXiv 2305.13301)."""

from __future__ import annotations

import io
import math

import torch
from PIL import Image
from torch import Tensor

from .base import Metadata, Reward, Scored


class JPEGCompressibility(Reward):
    """-size / 500 with the size of the JPEG file in kB (1000 bytes) at ``quality``; the detail is the size."""

    range = (-math.inf, 0.0)

    def __init__(self, quality: int = 95):
        if type(quality) is not int or not 1 <= quality <= 100:
            raise ValueError(f"quality: got {quality!r}, accepted are whole numbers from 1 to 100")
        self.quality = quality

    def _size(self, picture: Tensor) -> float:
        buffer = io.BytesIO()
        Image.fromarray(picture.numpy()).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        sizes = torch.tensor([self._size(picture) for picture in pictures.cpu()])
        return Scored(-sizes / 500, {"kilobytes": sizes})
