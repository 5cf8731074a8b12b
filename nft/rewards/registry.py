"""Rewards by name: the bundled ones, installed plug-ins, a user's own, and those of a reward server."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
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
        ValueError: no such name, module or attribute.
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
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"reward: got {name!r}, but there is no module {error.name!r}") from None
    except AttributeError:
        raise ValueError(f"reward: got {name!r}, but {module} has no {attribute!r}") from None


def check(name: str) -> None:
    """Whether a reward could be made, without making it.

    Raises:
        ValueError: an unknown reward.
        RewardError: packages that are not installed, with the command that installs them.
    """
    if name.startswith(REMOTE):
        return
    kind = find(name)
    missing = missing_packages(kind)
    if missing:
        raise RewardError(f"reward {name}: {', '.join(missing)} not installed: {install_hint(kind)}")


def load(name: str, *, device: str = "cpu", **options: Any) -> Reward:
    """Make a reward.

    Args:
        name: a registered name, ``module:attribute``, or ``http://host:port/name`` on a reward server.
        device: given to rewards that use one.
        options: the reward's own.

    Raises:
        ValueError: an unknown reward.
        RewardError: packages that are not installed, with the command that installs them.
    """
    check(name)
    if name.startswith(REMOTE):
        from .client import RemoteReward

        return RemoteReward(name, **options)
    kind = find(name)
    return kind(**({"device": device} if kind.uses_device else {}), **options)
