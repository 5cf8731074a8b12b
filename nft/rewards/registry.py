"""Rewards by name: the bundled ones, installed plug-ins, a user's own, and those of a reward server."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature
from typing import Any

from .base import Reward, RewardError, install_hint, missing_packages

ENTRY_POINTS = "nft.rewards"
REMOTE = ("http://", "https://")

BUNDLED = {
    "shapes": "nft.worlds.shapes.reward:ShapesReward",
    "geneval": "nft.rewards.detector:GenEvalReward",
    "ocr": "nft.rewards.ocr:OCR",
    "paddleocr": "nft.rewards.ocr:PaddleOCR",
    "pickscore": "nft.rewards.clip:PickScore",
    "clipscore": "nft.rewards.clip:CLIPScore",
    "hpsv2": "nft.rewards.clip:HPSv2",
    "aesthetic": "nft.rewards.clip:Aesthetic",
    "imagereward": "nft.rewards.image_reward:ImageReward",
    "unifiedreward": "nft.rewards.unified:UnifiedReward",
    "jpeg": "nft.rewards.jpeg:JPEGCompressibility",
}


def known() -> dict[str, str]:
    """Every reward's name and ``module:attribute``; plug-ins use the entry-point group ``nft.rewards``."""
    return BUNDLED | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def find(name: str) -> type[Reward]:
    """The class of a reward by name or ``module:attribute``, the module on the path or in the working folder.

    Raises:
        ValueError: no such name, module or attribute, a module that fails, or something that is no reward.
    """
    target = known().get(name, name)
    module, separator, attribute = target.partition(":")
    if not separator:
        near = get_close_matches(name, known(), n=1)
        guess = f", did you mean {near[0]}?" if near else ""
        accepted = f"{', '.join(known())}, module:attribute or a server's http://host:port/name"
        raise ValueError(f"reward: got {name!r}{guess}; accepted are {accepted}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"reward: got {name!r}, but there is no module {error.name!r}") from None
        raise ValueError(f"reward: got {name!r}, but {module} fails: {type(error).__name__}: {error}") from error
    if not hasattr(found, attribute):
        raise ValueError(f"reward: got {name!r}, but {module} has no {attribute!r}")
    kind = getattr(found, attribute)
    # A protocol with attributes does not take part in issubclass.
    if not (isinstance(kind, type) and Reward in kind.__mro__):
        raise ValueError(f"reward: got {name!r}, accepted is a subclass of nft.rewards.base.Reward")
    return kind


def _kind(name: str) -> type[Reward]:
    if name.startswith(REMOTE):
        from .client import RemoteReward

        return RemoteReward
    return find(name)


def _arguments(name: str, kind: type[Reward], device: str, options: dict[str, Any]) -> dict[str, Any]:
    if name.startswith(REMOTE):
        return {"url": name, **options}
    return {"device": device, **options} if kind.uses_device else options


def check(name: str, **options: Any) -> None:
    """Whether a reward could be made with these options, without making it.

    Raises:
        ValueError: an unknown reward, or options that it does not have or lacks.
        RewardError: packages that are not installed, with the command that installs them.
    """
    kind = _kind(name)
    missing = missing_packages(kind)
    if missing:
        raise RewardError(f"reward {name}: {', '.join(missing)} not installed: {install_hint(kind)}")
    accepted = signature(kind)
    try:
        accepted.bind(**_arguments(name, kind, "cpu", options))
    except TypeError as error:
        raise ValueError(f"reward {name}: {error}; accepted are {', '.join(accepted.parameters) or 'none'}") from None


def load(name: str, *, device: str = "cpu", **options: Any) -> Reward:
    """Make a reward.

    Args:
        name: a registered name, ``module:attribute``, or ``http://host:port/name`` on a reward server.
        device: given to rewards that use one.
        options: the reward's own.

    Raises:
        ValueError: an unknown reward, or options that it does not take.
        RewardError: packages that are not installed, with the command that installs them, or a reward that fails.
    """
    check(name, **options)
    kind = _kind(name)
    try:
        return kind(**_arguments(name, kind, device, options))
    except TypeError as error:
        raise ValueError(f"reward {name}: {error}, with the options {options or 'left out'}") from error
    except (ValueError, OSError, RewardError):
        raise
    # Whatever else a reward of others does.
    except Exception as error:
        raise RewardError(f"reward {name}: {type(error).__name__}: {error}") from error
