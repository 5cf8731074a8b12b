"""A task: prompts to train on, held-out prompts, and a score for pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from .data import prompts
from .rewards.base import Scored
from .rewards.combine import Combined, combine, weighted_sum
from .rewards.detector import GenEvalReward
from .rewards.geneval import Verdict
from .rewards.pool import RewardSpec, Scorer
from .worlds.shapes.prompts import sample, split
from .worlds.shapes.verify import verify


class Task(Protocol):
    """Made with the policy's device.

    ``score`` returns (B, 2): the reward that is trained and the score that is reported.
    """

    def __init__(self, device: torch.device) -> None: ...
    def train_prompts(self) -> list[list[dict[str, Any]]]: ...
    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]: ...
    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor: ...


def _table(verdicts: Iterable[Verdict]) -> Tensor:
    return torch.tensor([(verdict.partial, verdict.strict) for verdict in verdicts])


class Shapes:
    """The bundled shapes world: trains on GenEval's partial credit, reports the strict score."""

    def __init__(self, device: torch.device) -> None:
        pass

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group."""
        return list(split(held_out=False).values())

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on."""
        return sample(held_out=True, per_group=per_group)

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """Partial and strict score of uint8 pictures (B, H, W, 3), in [0, 1]: too many objects give 0, not less."""
        verdicts = (verify(picture.numpy(), entry) for picture, entry in zip(pictures.cpu(), entries, strict=True))
        return _table(verdicts).clamp_min(0)


class GenEval:
    """GenEval with COCO objects: trains on the partial credit, reports the strict score."""

    _BATCH = 16

    def __init__(self, device: torch.device) -> None:
        self.reward = GenEvalReward(device=device)

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group."""
        return prompts.train("geneval", prompts.held_out("geneval"))

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on."""
        return prompts.held_out("geneval", per_group)

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """Partial and strict score of uint8 pictures (B, H, W, 3), scored 16 at a time."""
        parts = [slice(start, start + self._BATCH) for start in range(0, len(entries), self._BATCH)]
        return _table(verdict for part in parts for verdict in self.reward.verdicts(pictures[part], entries[part]))


class Rewards:
    """Any prompts with any rewards, which are scored while the next pictures are drawn.

    A rollout calls ``submit`` as each batch is finished and ``gather`` at the end; ``combine`` makes of the scores what
    the loss needs. ``score`` does all of it at once.
    """

    def __init__(
        self,
        device: torch.device,
        rewards: Mapping[str, RewardSpec],
        *,
        train: str = "geneval",
        held_out: str | None = None,
        method: str = "sum",
        max_pending: int = 8,
    ):
        """Read the prompts and load the rewards.

        Args:
            device: of rewards that use one and whose spec names none.
            rewards: by the name they are logged under; the first one's score is reported, or its detail ``strict``.
            train: prompts to train on: ``shapes``, ``geneval``, ``ocr``, or a .txt or .jsonl file.
            held_out: prompts to report on, of the same kinds; by default the set's own, and needed beside a file.
            method: how several rewards become one, see ``nft.rewards.combine.combine``.
            max_pending: batches whose scoring is under way before ``submit`` waits.

        Raises:
            OSError, ValueError, RewardError: prompts or a reward that cannot be had, named.
        """
        if held_out is None and train not in prompts.SETS:
            raise ValueError(f"held_out: got none, accepted beside {train!r} is a prompt set or a file")
        self._held_out = held_out or train
        self._train = prompts.train(train, prompts.held_out(self._held_out))
        self._weights = {name: spec.weight for name, spec in rewards.items()}
        self._method = method
        self.scorer = Scorer(rewards, device=str(device), max_pending=max_pending)

    def train_prompts(self) -> list[list[dict[str, Any]]]:
        """Training prompts by task group."""
        return self._train

    def held_out_prompts(self, per_group: int) -> list[dict[str, Any]]:
        """A fixed set of prompts that are never trained on."""
        return prompts.held_out(self._held_out, per_group)

    def submit(self, pictures: Tensor, entries: list[dict[str, Any]]) -> None:
        """Start to score uint8 pictures (B, H, W, 3); see ``Scorer.submit``."""
        self.scorer.submit(pictures, entries)

    def gather(self) -> dict[str, Scored]:
        """Scores of all that was submitted, by reward; see ``Scorer.gather``."""
        return self.scorer.gather()

    def combine(self, scores: Mapping[str, Scored], group_ids: Tensor, **options: Any) -> Combined:
        """r, advantages and a line to log; ``options`` are ``std``, ``adv_clip_max`` and ``mode``."""
        rewards = {name: scored.score for name, scored in scores.items()}
        return combine(rewards, self._weights, group_ids, method=self._method, **options)

    def table(self, scores: Mapping[str, Scored]) -> Tensor:
        """(B, 2): the weighted sum of all rewards, and the score that is reported."""
        first = next(iter(scores.values()))
        total = weighted_sum({name: scored.score for name, scored in scores.items()}, self._weights)
        return torch.stack([total, first.details.get("strict", first.score)], dim=1)

    def score(self, pictures: Tensor, entries: list[dict[str, Any]]) -> Tensor:
        """(B, 2) as in ``table``."""
        self.submit(pictures, entries)
        return self.table(self.gather())

    def close(self) -> None:
        """Stop the rewards' workers."""
        self.scorer.close()


TASKS: dict[str, type[Task]] = {"shapes": Shapes, "geneval": GenEval}
