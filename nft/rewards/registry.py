"""Rewards by name: the bundled ones, installed plug-ins, a user's own, and those of a reward server."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, PositiveInt, ValidationError

from .. import plugins
from .base import Reward, RewardError, install_hint, missing_packages

ENTRY_POINTS = "nft.rewards"
REMOTE = ("http://", "https://")
_NONE: Mapping[str, Any] = MappingProxyType({})

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


class _Attributes(BaseModel, strict=True):
    """What a class of rewards says of itself, and a user's may say wrongly."""

    batch: PositiveInt
    range: tuple[float, float]
    needs: tuple[str, ...]


def known() -> dict[str, str]:
    """Every reward's name and ``module:attribute``; plug-ins use the entry-point group ``nft.rewards``."""
    return BUNDLED | {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def find(name: str) -> type[Reward]:
    """The class of a reward by name or ``module:attribute``, the module on the path or in the working folder.

    Raises:
        ValueError: no such name, module or attribute, a module that fails, or something that is no reward or says of
            itself what none can be.
    """
    installed = known()
    target = installed.get(name, name)
    module, _, attribute = target.partition(":")
    if not re.fullmatch(r"\w[\w.-]*:\w+", target):
        accepted = f"{', '.join(installed)}, module:attribute or a server's http://host:port/name"
        raise ValueError(f"reward: got {name!r}{guess(name, installed)}; accepted are {accepted}")
    found = plugins.load(module, f"reward: got {name!r}", registered=name in installed)
    if not hasattr(found, attribute):
        raise ValueError(f"reward: got {name!r}, but {module} has no {attribute!r}")
    kind = getattr(found, attribute)
    if not (isinstance(kind, type) and issubclass(kind, Reward)):
        raise ValueError(f"reward: got {name!r}, accepted is a subclass of nft.rewards.base.Reward")
    try:
        _Attributes(batch=kind.batch, range=kind.range, needs=kind.needs)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][0]
        raise ValueError(f"reward: got {name!r} with {key} = {getattr(kind, str(key))!r}, {problem['msg']}") from None
    if not kind.range[0] <= kind.range[1]:
        raise ValueError(f"reward: got {name!r} with range = {kind.range}, accepted is (lowest, highest)")
    return kind


def _kind(name: Any) -> type[Reward]:
    if not isinstance(name, str):
        raise ValueError(f"reward: got {name!r}, accepted is a name, module:attribute or an address")
    if name.startswith(REMOTE):
        from .client import RemoteReward

        return RemoteReward
    return find(name)


def guess(name: Any, names: Collection[str]) -> str:
    """What is added to a name that is none of ``names``: the nearest of them, if one is near."""
    near = get_close_matches(str(name).lower(), names, n=1)
    return f", did you mean {near[0]}?" if near else ""


def unknown(key: Any, keys: Collection[str], otherwise: str = "") -> str:
    """What is said of a key that is none of ``keys``: the nearest of them, or else ``otherwise`` or all."""
    otherwise = otherwise or f"accepted are {', '.join(keys) or 'none'}"
    return f"{key}: unknown key{guess(key, keys) or f', {otherwise}'}"


def _ours(name: str, kind: type[Reward], device: str) -> dict[str, Any]:
    """The arguments that are no options."""
    if name.startswith(REMOTE):
        return {"url": name}
    if device == "cuda":
        # Another thread will ask for scores, and there it would be the first one.
        device = f"cuda:{torch.cuda.current_device()}"
    return {"device": device} if kind.uses_device else {}


def _check_options(where: str, kind: type[Reward], ours: dict[str, Any], options: Mapping[str, Any]) -> None:
    taken = signature(kind)
    own = [key for key in taken.parameters if key not in ours]
    open_ended = any(one.kind is Parameter.VAR_KEYWORD for one in taken.parameters.values())
    for key, value in options.items():
        if key in ours:
            raise ValueError(f"{where}.options.{key}: got {value!r}, accepted is none: it is given beside the options")
        if not isinstance(key, str) or (key not in own and not open_ended):
            raise ValueError(f"{where}.options.{unknown(key, own)}")
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"{where}.options.{key}: got {value!r}, accepted are JSON's types") from None
    try:
        taken.bind(**ours, **options)
    except TypeError as error:
        raise ValueError(f"{where}.options: {error}; accepted are {', '.join(own)}") from None


def check(name: str, options: Mapping[str, Any] = _NONE, *, device: str | None = None, where: str = "") -> type[Reward]:
    """Whether a reward could be made like this, without making it.

    Args:
        name, options: see ``load``.
        device: one that was given for this reward alone.
        where: what messages call its settings; ``rewards.NAME`` by default.

    Returns:
        its class.

    Raises:
        ValueError: an unknown reward, a device that it does not use or this machine lacks, or options that it does not
            have or lacks.
        RewardError: packages that are not installed, with the command that installs them.
    """
    try:
        kind = _kind(name)
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if where else str(error)) from error
    where = where or f"rewards.{name}"
    missing = missing_packages(kind)
    if missing:
        raise RewardError(f"reward {name}: {', '.join(missing)} not installed: {install_hint(kind)}")
    _check_options(where, kind, _ours(name, kind, "cpu"), options)
    if device is not None and not kind.uses_device:
        raise ValueError(f"{where}.device: got {device!r}, accepted is none, as {name} uses no device")
    try:
        if device is not None:
            from ..config import usable_device

            usable_device(device)
        if name.startswith(REMOTE):
            from .client import check_connection

            check_connection(name, **options)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None
    return kind


def examine(
    name: str,
    options: Mapping[str, Any] = _NONE,
    *,
    device: str | None = None,
    where: str = "",
    ask: bool = False,
) -> Reward | type[Reward]:
    """Check as ``check``, and make a reward that uses no device, nor, unless it is to ``ask``, a server.

    Returns:
        the reward, or its class; either says what it needs.

    Raises:
        ValueError, FileNotFoundError, RewardError: see ``check`` and ``load``.
    """
    kind = check(name, options, device=device, where=where)
    known_later = kind.uses_device or (name.startswith(REMOTE) and not ask)
    if known_later:
        return kind
    reward = load(name, options, where=where)
    if ask:
        reward.check_server()
    return reward


def load(name: str, options: Mapping[str, Any] = _NONE, *, device: str = "cpu", where: str = "") -> Reward:
    """Make a reward.

    Args:
        name: a registered name, ``module:attribute``, or ``http://host:port/name`` on a reward server.
        options: the reward's own, with JSON's types.
        device: given to rewards that use one.
        where: see ``check``.

    Raises:
        ValueError: an unknown reward, or options that it does not take.
        FileNotFoundError: weights that are neither on disk nor reachable.
        RewardError: packages that are not installed, with the command that installs them, or a reward that fails.
    """
    kind, where = check(name, options, where=where), where or f"rewards.{name}"
    try:
        return kind(**_ours(name, kind, device), **options)
    except (OSError, RewardError):
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    # Its exit is not the command's.
    except (Exception, SystemExit) as error:
        raise RewardError(f"{where}: {type(error).__name__}: {error}") from error
