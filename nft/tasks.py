"""A task: prompts to train on, held-out prompts, and a score for pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .config import Config
from .data import prompts
from .rewards import registry
from .rewards.base import Reward, check_entries, fetch_weights
from .rewards.pool import RewardSpec, Scorer
from .worlds.shapes.reward import ShapesReward


class Task(ABC):
    """What is drawn and how it is scored. A rollout calls ``submit`` for each finished batch, and then ``gather``.

    A score is a row (R + 1): the rewards of ``weights`` in their order, and the score that is reported.
    """

    weights: Mapping[str, float] = MappingProxyType({"reward": 1.0})
    """What every reward counts in the combination; 0 for one that is only watched."""
    method = "sum"
    """How several rewards become one, see ``nft.rewards.combine.combine``."""

    def __init__(self, train: str, held_out: str | None = None) -> None:
        """Read the prompts to train and to report on: ``shapes``, ``geneval``, ``ocr``, ``preference``, or a .txt or
        .jsonl file; those to report on are the set's own by default, and needed beside a file.

        Raises:
            OSError, ValueError: prompts that cannot be had, named.
        """
        self._train, self._held_out = _prompts(train, held_out)
        self._source = held_out or train
        self._scored: list[Tensor] = []

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group."""
        return self._train

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on, whatever becomes of their file while a run goes on."""
        if self._source == "shapes":
            # Of its small groups more than there are, some of them again.
            return prompts.held_out(self._source, per_group)
        return prompts.first(self._held_out, per_group)

    @abstractmethod
    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """(B, R + 1) for uint8 pictures (B, H, W, 3)."""

    def submit(self, pictures: Tensor, entries: list[dict[str, Any]]) -> None:
        """Hand over pictures to be scored."""
        self._scored.append(self.score(pictures, entries))

    def gather(self) -> Tensor:
        """(B, R + 1) of all that was submitted since the last call, in its order.

        Raises:
            RewardError: a reward failed, named. Nothing is lost: call again to score what is missing.
        """
        scored, self._scored = self._scored, []
        return torch.cat(scored)

    def close(self) -> None:
        """Forget what was submitted and stop what the task has started."""
        self._scored.clear()


class Shapes(Task):
    """The bundled shapes world: trains on GenEval's partial credit, reports the strict score."""

    def __init__(self, device: torch.device) -> None:
        super().__init__("shapes")

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """Score and strict score of ``ShapesReward``, (B, 2)."""
        scored = ShapesReward()(pictures, [entry["prompt"] for entry in entries], entries)
        return torch.stack([scored.score, scored.details["strict"]], dim=1)


def _prompts(train: str, held_out: str | None) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Training prompts by task group, and those that are held out."""
    if held_out is None and train not in prompts.SETS:
        # First, as it may be no file but a set's misspelt name.
        prompts.read(Path(train))
        raise ValueError(f"held_out_prompts: got none, accepted beside {train!r} is a prompt set or a file")
    kept_away = prompts.held_out(held_out or train)
    return prompts.train(train, kept_away), kept_away


def _check_needs(
    judge: Reward | type[Reward], groups: list[list[dict[str, Any]]], kept_away: list[dict[str, Any]]
) -> None:
    check_entries(judge, [*chain(*groups)], "prompts")
    check_entries(judge, kept_away, "held_out_prompts")


class Rewards(Task):
    """Any prompts with any rewards, which are scored while the next pictures are drawn."""

    def __init__(
        self,
        device: torch.device,
        rewards: Mapping[str, RewardSpec],
        *,
        train: str,
        held_out: str | None = None,
        method: str = "sum",
    ):
        """Read the prompts and load the rewards.

        Args:
            device: of rewards that use one and whose spec names none.
            rewards: by the name they are logged under; the first one's score is reported, or its detail ``strict``.
            train, held_out: prompts to train and to report on, see ``Task``.
            method: how several rewards become one, see ``nft.rewards.combine.combine``.

        Raises:
            OSError, ValueError, RewardError: prompts or a reward that cannot be had, or prompts without what a reward
            needs, named.
        """
        super().__init__(train, held_out)
        self.weights = {name: spec.weight for name, spec in rewards.items()}
        self.method = method
        self.scorer = Scorer(rewards, device=str(device))
        try:
            for judge in self.scorer.judges.values():
                _check_needs(judge, self._train, self._held_out)
        except ValueError:
            self.close()
            raise

    def submit(self, pictures: Tensor, entries: list[dict[str, Any]]) -> None:
        """Start to score uint8 pictures (B, H, W, 3); see ``Scorer.submit``."""
        self.scorer.submit(pictures, entries)

    def gather(self) -> Tensor:
        """(B, R + 1), last the first reward's detail ``strict``, or its score if it has none; see ``Scorer.gather``."""
        scores = self.scorer.gather()
        first = next(iter(scores.values()))
        rewards = [scored.score for scored in scores.values()]
        return torch.stack([*rewards, first.details.get("strict", first.score)], dim=1)

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """(B, R + 1), all at once."""
        self.submit(pictures, entries)
        return self.gather()

    def close(self) -> None:
        """Stop the rewards' workers."""
        self.scorer.close()


TASKS = {"shapes": Shapes}


def build(config: Config, device: torch.device) -> Task:
    """The task of a configuration.

    Raises:
        OSError, ValueError, RewardError: prompts or a reward that cannot be had, named.
    """
    if config.prompts is None:
        return TASKS[config.task](device)
    specs, held_out = config.reward_specs(), config.held_out_prompts
    return Rewards(device, specs, train=config.prompts, held_out=held_out, method=config.combine)


def check(config: Config, *, ask: bool = False) -> None:
    """Look for all that a task needs which is built later, so that a curriculum cannot fail at its second stage for
    what could be known at its start: but for rewards on a device, which are not loaded, and, unless it is to ``ask``
    them, on servers, which may be started by then.

    Raises:
        OSError, ValueError, RewardError: as ``build``.
    """
    if config.prompts is None:
        # A task that brings its own, and its reward.
        return
    groups, kept_away = _prompts(config.prompts, config.held_out_prompts)
    for name, spec in config.reward_specs().items():
        judge = registry.examine(spec.reward, spec.options, device=spec.device, where=f"rewards.{name}", ask=ask)
        if isinstance(judge, type):
            fetch_weights(judge, spec.options)
        _check_needs(judge, groups, kept_away)
