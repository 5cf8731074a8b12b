"""Full fine-tuning: every weight of the transformer is trained, and the old and the reference policy are copies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from .config import Config
from .distributed import local, shard, sharded_like
from .policy import Policy
from .weights import WEIGHTS, check_fit, check_layers, lora_layers, lora_settings, sound_weights, weight_shapes


class FullPolicy(Policy):
    """A policy without adapters. ``use`` exchanges the weights themselves; sharded ones stay where they are, and their
    contents are exchanged.

    Small updates would vanish in half precision, so all copies are float32, and ``dtype=bfloat16`` computes
    under autocast.
    """

    def __init__(self, config: Config, kept: tuple[str | None, ...] = ("old", None)):
        """As of every policy.

        Args:
            kept: of the old policy and the reference model (None), those that will be used beside the trained one; each
                is a copy of all weights.
        """
        self._kept = kept
        super().__init__(config)

    def _add_adapters(self, config: Config) -> None:
        self.transformer.float().requires_grad_(True)
        # What a sharded class says about itself is not its own name.
        self._settings = self.transformer.to_json_string()
        if self.sharded:
            shard(self.transformer, self.device, ())
        self.trained = list(self.transformer.parameters())
        self._weights: dict[str | None, list[Tensor]] = {"default": [p.data for p in self.trained]}
        for name in self._kept:
            self._weights[name] = [p.data.clone() for p in self.trained]
        self._old = self._weights.get("old", [])
        self._used: str | None = "default"

    def use(self, adapter: str | None) -> None:
        """Choose the weights of the next evaluations; None is the reference model."""
        if self.sharded:
            if adapter != self._used:
                self._exchange(self._used)
                self._exchange(adapter)
                self._used = adapter
            return
        for parameter, weight in zip(self.trained, self._weights[adapter], strict=True):
            parameter.data = weight
            parameter.requires_grad_(adapter == "default")

    @torch.no_grad()
    def _exchange(self, adapter: str | None) -> None:
        """Let the parameters and the place of these weights swap what they hold."""
        if adapter == "default":
            return
        for parameter, weight in zip(self.trained, self._weights[adapter], strict=True):
            here, there = local(parameter), local(weight)
            held = here.clone()
            here.copy_(there)
            there.copy_(held)

    @contextmanager
    def merged(self, adapter: str, *, float8: bool = False) -> Iterator[None]:
        """Evaluate with these weights; there is nothing to merge."""
        self.use(adapter)
        try:
            with self._rollouts(float8):
                yield
        finally:
            self.use("default")

    def velocity(self, x_t: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        """As of every policy, in ``dtype``."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return super().velocity(x_t, t, *conditions)

    def save_adapter(self, adapter: str, folder: Path | None) -> None:
        """Write the weights as diffusers' transformers are stored."""
        self.use(adapter)
        # Put together one by one, and kept by the first process alone.
        state: dict[str, Any] = get_model_state_dict(
            self.transformer, options=StateDictOptions(full_state_dict=True, cpu_offload=self.sharded)
        )
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(self._settings)
            weights = {name: weight.contiguous() for name, weight in state.items()}
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        self.use("default")

    def load_adapter(self, adapter: str, folder: Path) -> None:
        """Read weights that ``save_adapter`` wrote.

        Raises:
            OSError, ValueError: a file that is missing or damaged, or weights of another transformer.
        """
        parameters = dict(self.transformer.named_parameters())
        check_fit(folder / WEIGHTS, weight_shapes(folder / WEIGHTS), self.transformer.state_dict())
        with safe_open(folder / WEIGHTS, "pt") as file:
            for name, weight in zip(parameters, self._weights[adapter], strict=True):
                weight.copy_(sharded_like(file.get_tensor(name), weight))


class _LoraPolicy(Policy):
    """A policy whose adapters have the layers, rank and alpha of a file, and ``default`` its weights."""

    def __init__(self, config: Config, path: Path):
        self._path, self._layers = path, lora_layers(path)
        lora = lora_settings(path, self._layers)
        super().__init__(config.model_copy(update={"lora_rank": lora["r"], "lora_alpha": lora["lora_alpha"]}))
        del self._layers

    def _add_adapters(self, config: Config) -> None:
        check_layers(self._path, self._layers, self.transformer)
        # A list would be of the ends of names: an adapted proj_out would adapt every block's, too.
        self.model.targets = "|".join(map(re.escape, self._layers))
        super()._add_adapters(config)
        self._set_adapter("default", self._path, self._layers)


def load_policy(config: Config, checkpoint: Path | None, *, reference: bool = False) -> Policy:
    """The policy of a configuration whose weights ``default`` are those of a run, a checkpoint, a LoRA, or a folder
    of whole weights; without one it is the base. It is there to draw with, beside the base only if that is to be the
    ``reference``.

    Raises:
        CheckpointError, OSError, ValueError: as the constructor, ``sound_weights`` and ``load_adapter``.
    """
    if checkpoint is None:
        return Policy(config)
    path = sound_weights(checkpoint)
    if path.name != WEIGHTS:
        return _LoraPolicy(config, path)
    # Without what the settings refuse together with it.
    speed = {"fused_transformer": False, "cuda_graphs": False, "float8_rollout": False}
    full = config.model_copy(update={"adapter": "full", **speed})
    policy = FullPolicy(full, kept=(None,) if reference else ())
    policy.load_adapter("default", path.parent)
    return policy
