"""What a reward is, and the one way to ask it for scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Metadata = list[dict[str, Any]]


class Scored(NamedTuple):
    """A float32 score per picture (B,) and named details of the same shape."""

    score: Tensor
    details: dict[str, Tensor]


class RewardError(RuntimeError):
    """A reward that failed or cannot be reached; the message names it."""


class Reward(ABC):
    """Scores pictures. Subclass it and write ``__call__``; the attributes say what the reward is and needs."""

    range: tuple[float, float] = (-math.inf, math.inf)
    """Lowest and highest possible score; a score outside is an error."""
    needs: tuple[str, ...] = ()
    """Keys that every picture's metadata must hold."""
    packages: tuple[str, ...] = ()
    """Importable packages beyond nft's own."""
    extra: str = ""
    """The optional extra that installs ``packages``."""
    weights: Mapping[str, str] = MappingProxyType({})
    """Hub names of its default weights, each with a file that tells whether they are here."""
    files: Mapping[str, str] = MappingProxyType({})
    """Files that it looks for in the working folder by default, each with the address that it comes from."""
    uses_device: bool = False
    """Whether the constructor takes ``device``."""
    threaded: bool = False
    """Whether it waits for a device or a network most of the time; the others run in processes of their own."""
    batch: int = 16
    """Pictures per call."""

    def check_server(self) -> None:
        """Raise ``RewardError`` where a server that it asks for scores does not answer."""

    @staticmethod
    def check_prompt(prompt: str, entry: dict[str, Any]) -> None:
        """Raise ``ValueError`` for a prompt that cannot be scored with this metadata, beyond what ``needs`` says."""

    @abstractmethod
    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored | Tensor:
        """Scores (B,) of uint8 pictures (B, H, W, 3), alone or with details; higher is better."""


def name_of(reward: Reward | type[Reward]) -> str:
    """What messages call a reward or a kind of rewards."""
    return getattr(reward, "name", getattr(reward, "__name__", type(reward).__name__))


def missing_packages(kind: type[Reward]) -> list[str]:
    """The packages of a kind of reward that are not installed."""
    return [name for name in kind.packages if find_spec(name) is None]


def missing_weights(kind: type[Reward]) -> list[str]:
    """The hub names whose weights are not in this machine's cache."""
    if not kind.weights:
        return []
    from huggingface_hub import try_to_load_from_cache

    return [repo for repo, file in kind.weights.items() if not isinstance(try_to_load_from_cache(repo, file), str)]


def install_hint(kind: type[Reward]) -> str:
    """How to install what is missing, in one line."""
    return f'pip install "diffusion-nft[{kind.extra}]"' if kind.extra else f"pip install {' '.join(kind.packages)}"


def validate(reward: Reward | type[Reward], pictures: Tensor, prompts: list[str], metadata: Metadata) -> None:
    """Check a batch against a reward's needs.

    Raises:
        TypeError: pictures that are not a uint8 tensor.
        ValueError: wrong shapes, lengths that differ, or a prompt or metadata without what the reward needs.
    """
    if not isinstance(pictures, Tensor) or pictures.dtype != torch.uint8:
        raise TypeError(f"pictures: got {getattr(pictures, 'dtype', type(pictures))}, accepted is a uint8 tensor")
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or not pictures.numel():
        raise ValueError(f"pictures: got shape {tuple(pictures.shape)}, accepted is (B, H, W, 3)")
    for label, values in (("prompts", prompts), ("metadata", metadata)):
        if len(values) != len(pictures):
            raise ValueError(f"{label}: got {len(values)}, accepted is one per picture, {len(pictures)}")
    check_needs(reward, prompts, metadata)


def check_needs(reward: Reward | type[Reward], prompts: list[str], metadata: Metadata) -> None:
    """Check prompts and their entries against a reward's needs.

    Raises:
        ValueError: an entry without a key that the reward needs, or a prompt that it cannot score.
    """
    for i, (prompt, entry) in enumerate(zip(prompts, metadata, strict=True)):
        lacking = [key for key in reward.needs if key not in entry]
        if lacking:
            raise ValueError(f"metadata: entry {i} lacks {', '.join(lacking)}, which {name_of(reward)} needs")
        try:
            reward.check_prompt(prompt, entry)
        except ValueError as error:
            raise ValueError(f"metadata: entry {i}, {prompt!r}: {error}") from None
        except Exception as error:
            said = f"{name_of(reward)}.check_prompt: {type(error).__name__}: {error}"
            raise RewardError(f"metadata: entry {i}, {prompt!r}: {said}") from error


def check_entries(reward: Reward | type[Reward], entries: Metadata, where: str) -> None:
    """``check_needs`` of entries with their prompts, which come from ``where``.

    Raises:
        ValueError: as there.
    """
    try:
        check_needs(reward, [entry["prompt"] for entry in entries], entries)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def score(
    reward: Reward, pictures: Tensor, prompts: list[str], metadata: Metadata, *, all_finite: bool = True
) -> Scored:
    """Ask a reward for its scores, ``reward.batch`` pictures at a time.

    Args:
        reward: any reward.
        pictures: uint8 (B, H, W, 3) on any device.
        prompts, metadata: one of each per picture.
        all_finite: whether a score or detail that is NaN or infinite is an error.

    Returns:
        scores and details on the CPU in float32.

    Raises:
        TypeError, ValueError: a batch that does not fit (see ``validate``).
        RewardError: a reward that fails, scores that are no tensor, of a wrong shape, not finite, or outside of the
            reward's range, or details that differ from call to call.
    """
    validate(reward, pictures, prompts, metadata)
    parts: list[Scored] = []
    for start in range(0, len(pictures), reward.batch):
        part = slice(start, start + reward.batch)
        try:
            result = reward(pictures[part], prompts[part], metadata[part])
        except RewardError:
            raise
        # Its exit is not the command's.
        except (Exception, SystemExit) as error:
            raise RewardError(f"{name_of(reward)}: {type(error).__name__}: {error}") from error
        scored = result if isinstance(result, Scored) else Scored(result, {})
        if "score" in scored.details:
            raise RewardError(f"{name_of(reward)}: a detail is called score, accepted is another name")
        columns = {"score": scored.score, **scored.details}
        for label, values in columns.items():
            if not isinstance(values, Tensor):
                raise RewardError(f"{name_of(reward)}: {label} is a {type(values).__name__}, not a tensor")
            if values.shape != (len(prompts[part]),):
                raise RewardError(f"{name_of(reward)}: {label} has shape {tuple(values.shape)}, not one per picture")
            if all_finite and not values.isfinite().all():
                raise RewardError(f"{name_of(reward)}: {label} holds NaN or infinity")
        # A sum of float32 terms may pass its own bound by a rounding error.
        low, high = (limit + sign * 1e-5 for limit, sign in zip(reward.range, (-1, 1), strict=True))
        within = (scored.score >= low) & (scored.score <= high)
        if not (within | ~scored.score.isfinite()).all():
            raise RewardError(f"{name_of(reward)}: got {scored.score.tolist()}, its range is {reward.range}")
        columns = {label: values.detach().float().cpu() for label, values in columns.items()}
        parts.append(Scored(columns.pop("score"), columns))
    return join(name_of(reward), parts)


def join(name: str, parts: list[Scored]) -> Scored:
    """One result of several batches in their order.

    Raises:
        RewardError: details that not all of them have.
    """
    for part in parts:
        if part.details.keys() != parts[0].details.keys():
            found = " and ".join(str(sorted(each.details)) for each in (parts[0], part))
            raise RewardError(f"{name}: got details {found}, accepted are the same in every call")
    details = {name: torch.cat([part.details[name] for part in parts]) for name in parts[0].details}
    return Scored(torch.cat([part.score for part in parts]), details)


def from_hub(load: Callable[[str], T], source: str) -> T:
    """Load weights by hub name or folder.

    Raises:
        FileNotFoundError: weights that are neither on disk nor reachable, with the command that fetches them.
        ValueError: a folder that cannot be loaded, and why.
    """
    try:
        return load(source)
    except (OSError, ValueError) as error:
        if Path(source).exists():
            raise ValueError(f"reward weights: {source!r} cannot be loaded: {error}") from error
        raise FileNotFoundError(
            f"reward weights: {source!r} is neither on disk nor reachable: run `hf download {source}` or give a folder "
            f"({str(error).strip().partition(chr(10))[0]})"
        ) from error


def fetch_weights(kind: type[Reward], options: Mapping[str, Any]) -> None:
    """See to it that the default weights and files which these options leave in place are here, or can be had.

    Raises:
        FileNotFoundError: one that is neither on disk nor reachable, with where it comes from.
    """
    used = [one.default for key, one in signature(kind).parameters.items() if key not in options]
    for file, where in kind.files.items():
        if file in used and not Path(file).is_file():
            raise FileNotFoundError(f"reward weights: no file {file!r}: download it from {where}")
    for repo in missing_weights(kind):
        if repo in used:
            from huggingface_hub import hf_hub_download

            from_hub(partial(hf_hub_download, filename=kind.weights[repo]), repo)
