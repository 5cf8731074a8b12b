"""Full fine-tuning: every weight of the transformer is trained, and the old and the reference policy are copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from .config import Config
from .policy import Policy

WEIGHTS = "diffusion_pytorch_model.safetensors"


class FullPolicy(Policy):
    """A policy without adapters. ``use`` exchanges the weights themselves.

    Small updates would vanish in half precision, so all three copies are float32, and ``dtype=bfloat16`` computes
    under autocast.
    """

    def _add_adapters(self, config: Config) -> None:
        self.transformer.float().requires_grad_(True)
        self.trained = list(self.transformer.parameters())
        self._weights: dict[str | None, list[Tensor]] = {"default": [p.data for p in self.trained]}
        for name in ("old", None):
            self._weights[name] = [p.data.clone() for p in self.trained]
        self._old = self._weights["old"]

    def use(self, adapter: str | None) -> None:
        """Choose the weights of the next evaluations; None is the reference model."""
        for parameter, weight in zip(self.trained, self._weights[adapter], strict=True):
            parameter.data = weight
            parameter.requires_grad_(adapter == "default")

    @contextmanager
    def merged(self, adapter: str) -> Iterator[None]:
        """Evaluate with these weights; there is nothing to merge."""
        self.use(adapter)
        try:
            with self._rollouts():
                yield
        finally:
            self.use("default")

    def velocity(self, x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """As of every policy, in ``dtype``."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return super().velocity(x_t, t, *conditions)

    def save_adapter(self, adapter: str, folder: Path) -> None:
        """Write the weights as diffusers' transformers are stored."""
        self.use(adapter)
        self.transformer.save_pretrained(folder, max_shard_size="1000GB")
        self.use("default")

    def load_adapter(self, adapter: str, folder: Path) -> None:
        """Read weights that ``save_adapter`` wrote."""
        state = load_file(folder / WEIGHTS)
        names = [name for name, _ in self.transformer.named_parameters()]
        for name, weight in zip(names, self._weights[adapter], strict=True):
            weight.copy_(state[name])
