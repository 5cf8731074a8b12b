"""Settings as they are written, in files of YAML 1.2 with a ``base`` and as ``key=value``. What they may be says
``nft.config``."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

_BUNDLED = Path(__file__).parent / "configs"


class ConfigError(ValueError, TypeError):
    """A configuration that cannot be used; the message names the key, what came and what is accepted."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of version 1.2, where 3e-4 and 010 are decimal and 1:30 is text, and a key comes once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if (times := keys.count(key.value)) > 1:
                problem = f"{key.value}: comes {times} times, accepted is once"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


class Dumper(yaml.SafeDumper):
    """Quotes what is a number in either version of YAML."""


_INT, _FLOAT, _TIME = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _TIME)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, Dumper):
    for _tag, _pattern in (
        (_INT, r"[-+]?[0-9]+$"),
        (_FLOAT, r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
        (_FLOAT, r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    ):
        _kind.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))
_Loader.add_constructor(_INT, lambda loader, node: int(loader.construct_scalar(node)))


def parsed(text: str, where: str) -> Any:
    """A value in YAML; ``where`` it comes from begins the message.

    Raises:
        ConfigError: it is none.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where}: is not YAML: {problem}") from None
    except Exception as error:
        # What Python raises for text that is not of its tag, a number that is too long or too deep a list.
        raise ConfigError(f"{where}: cannot be read: {error!r}") from None


def read_settings(path: Path) -> dict[str, Any]:
    """What a file of settings says itself, not checked.

    Raises:
        ConfigError: a file that cannot be read, or no YAML mapping.
    """
    try:
        values = parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} holds {type(values).__name__}, accepted are key: value pairs")
    return values


def saved_settings(checkpoint: Path) -> Path | None:
    """The settings of the run that a checkpoint, or an adapter in it, belongs to, or that it is; None of others."""
    # An adapter's file lies as deep as in run/checkpoints/epoch-N/ema.
    for folder in (checkpoint, *checkpoint.resolve().parents[:4]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder / "config.yaml"
    return None


def read_based(name: str, beside: Path, seen: tuple[Path, ...] = (), key: str = "config") -> dict[str, Any]:
    """The values of a file over those of its ``base``, a name or list of names, of which later ones win.

    Args:
        name: a bundled configuration's name, or the path of a YAML file, which may be relative to ``beside``.
        seen: the files that have this one as their base.
        key: what messages call ``name``.

    Raises:
        ConfigError: a file that is missing, cannot be read or is its own base, or a base that is no name.
    """
    path = beside / name if name.endswith((".yaml", ".yml")) else _BUNDLED / f"{name}.yaml"
    if not os.path.isfile(path):  # which is false, too, for a name that no file can have
        known = sorted(p.stem for p in _BUNDLED.glob("*.yaml"))
        near = get_close_matches(path.stem.lower(), known, n=1)
        missing = "" if path.parent == _BUNDLED or os.path.exists(beside / name) else "but there is no such file; "
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"{key}: got {name!r}, {missing}{hint}accepted are {', '.join(known)} or the path of a .yaml or .yml file"
        )
    if path.resolve() in seen:
        raise ConfigError(f"base: {path.name} is its own base")
    values = read_settings(path)
    bases = values.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ConfigError(f"base: got {bases!r}, accepted is the name of a configuration or a list of names")
    inherited: dict[str, Any] = {}
    for base in bases:
        inherited = _over(inherited, read_based(base, path.parent, (*seen, path.resolve()), f"base of {path}"))
    return _over(inherited, values)


def _over(inherited: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What a file says over its base. How long a run is its stages say, where it has any, and not a base without."""
    return {key: value for key, value in inherited.items() if key != "epochs" or "stages" not in values} | values


def override(values: dict[str, Any], item: str) -> None:
    """Set ``a.b=value`` in nested values; a part of the key is a name or the index of a list.

    Raises:
        ConfigError: no key and value in YAML, or nothing of that key to set.
    """
    dotted, separator, text = item.partition("=")
    *path, last = dotted.split(".")
    if not separator or not all([*path, last]):
        raise ConfigError(f"override: got {item!r}, accepted is key=value")
    value = parsed(text, dotted)
    target: Any = values
    try:
        for part in path:
            target = target[_index(part)] if isinstance(target, list) else target.setdefault(part, {})
        target[_index(last) if isinstance(target, list) else last] = value
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ConfigError(f"override: got {item!r}, but there is no {dotted} to set") from None


def _index(part: str) -> int:
    if not part.isdecimal():
        raise ValueError(part)
    return int(part)
