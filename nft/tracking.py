"""Trackers beside metrics.jsonl, which is always written: those that accelerate knows."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from .config import Config

# Most of an evaluation's that a tracker is given.
_PICTURES = 24


class Tracker:
    """The tracker that a configuration names, or none. Only the main process starts it."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Check that it can be started.

        Raises:
            ValueError: its package is not installed.
        """
        self._config, self._folder = config, folder
        self._tracker: Any = None
        name = config.tracker
        if name != "none" and name not in [str(found) for found in get_available_trackers()]:
            raise ValueError(
                f"tracker: got {name!r}, but its package is missing; `pip install {name}`, or tracker=none"
            )

    def start(self) -> None:
        """Begin a run of the project ``nft``, or for W&B that of ``WANDB_PROJECT``, that is called as the folder is, or
        for W&B as ``WANDB_NAME`` says.

        Raises:
            ValueError: a tracker that does not start, as one that nobody has logged in to.
        """
        name = self._config.tracker
        if name == "none":
            return
        kind = LOGGER_TYPE_TO_CLASS[name]
        project, title = "nft", self._folder.resolve().name
        if name == "wandb":
            project, title = os.environ.get("WANDB_PROJECT") or project, os.environ.get("WANDB_NAME") or title
        options = {"logging_dir": self._folder} if kind.requires_logging_directory else {"name": title}
        # Trackers take flat values only.
        flat = {k: v for k, v in self._config.model_dump().items() if not isinstance(v, dict | list) and v is not None}
        try:
            self._tracker = kind(project, **options)
            self._tracker.start()
            self._tracker.store_init_configuration({**flat, "config": self._config.dump()})
        except Exception as error:
            raise ValueError(f"tracker: {name} does not start: {error}; accepted is one that does, or none") from error

    def log(self, metrics: dict[str, Any], epoch: int) -> None:
        """One epoch's numbers."""
        if self._tracker:
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self._tracker.log(numbers, step=epoch)

    def pictures(self, pictures: Tensor, epoch: int) -> None:
        """Some of an evaluation's pictures (B, H, W, 3), where the tracker takes any."""
        if not hasattr(self._tracker, "log_images"):
            return
        some = pictures[:: math.ceil(len(pictures) / _PICTURES)]
        # TensorBoard's writer wants one array with channels first, the others are given a list.
        channels_first = self._config.tracker == "tensorboard"
        values = some.permute(0, 3, 1, 2).numpy() if channels_first else list(some.numpy())
        self._tracker.log_images({"held_out": values}, step=epoch)

    def finish(self) -> None:
        """Close it."""
        if self._tracker:
            self._tracker.finish()
