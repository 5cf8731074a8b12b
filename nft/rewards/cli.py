"""Commands about rewards: ``nft rewards`` and ``nft reward-server``."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ..console import catalog, fail, failing, say


def _interval(low: float, high: float) -> str:
    return f"{'(-inf' if math.isinf(low) else f'[{low:g}'}, {'inf)' if math.isinf(high) else f'{high:g}]'}"


def _row(name: str) -> tuple[str, ...]:
    from .base import install_hint, missing_packages, missing_weights
    from .registry import find

    kind = find(name)
    state = [f"{', '.join(missing)} missing: {install_hint(kind)}"] if (missing := missing_packages(kind)) else []
    state += [f"weights missing: hf download {weights}" for weights in missing_weights(kind)]
    state += [f"{file} missing: {where}" for file, where in kind.files.items() if not Path(file).is_file()]
    needs = ", ".join(("prompt", *kind.needs))
    about = (kind.__doc__ or "").strip().partition("\n")[0].replace("``", "")
    device = "any" if kind.uses_device else "CPU"
    return name, _interval(*kind.range), needs, device, "\n".join(state) or "installed", about


def rewards() -> None:
    """List the rewards, with what is installed and what is missing."""
    from .registry import known

    listing = catalog("name", "range", "needs", "device", "state", "what it is")
    for name in known():
        try:
            row = _row(name)
        # Whatever is wrong with one, of which many are others', the list is of all.
        except Exception as error:
            row = (name, "", "", "", f"broken: {error}", "")
        listing.add_row(*map(escape, row))
    # Of its own, which is as wide as the terminal is now.
    Console(emoji=False).print(listing)


def reward_options(settings: list[str], names: list[str]) -> dict[str, dict[str, Any]]:
    """``NAME.KEY=VALUE`` settings by reward."""
    from ..settings import parsed

    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in settings:
        target, separator, value = setting.partition("=")
        name, dot, key = target.rpartition(".")
        if not (separator and dot and key) or name not in options:
            raise ValueError(f"--set: got {setting!r}, accepted is NAME.KEY=VALUE with a NAME of {', '.join(options)}")
        if key in options[name]:
            raise ValueError(f"--set: got {setting!r} beside another {target}, accepted is one of them")
        options[name][key] = parsed(value, f"--set {target}")
    return options


def _check_address(host: str, port: int) -> None:
    """Raise ``ValueError`` where nothing can listen."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"host and port: got {host} and {port}, which cannot be listened on: {error.strerror}"
        ) from None


def reward_server(
    names: Annotated[list[str], typer.Argument(help="rewards to serve, see `nft rewards`, or module:attribute")],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8600,
    device: Annotated[str, typer.Option(help="of rewards that use one, such as cuda:1")] = "cpu",
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME.KEY=VALUE, a reward's own option")] = None,
    max_mib: Annotated[int, typer.Option(min=1, help="largest request in MiB")] = 64,
    max_pictures: Annotated[int, typer.Option(min=1, help="most pictures of a request")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that are let in at a time")] = 16,
    token_file: Annotated[Path | None, typer.Option(help="file with the token; else NFT_REWARD_TOKEN")] = None,
) -> None:
    """Serve rewards over HTTP to a trainer in another environment or on another machine.

    Senders must show a token. Without --token-file or NFT_REWARD_TOKEN one is made up and printed.
    """
    from ..config import usable_device
    from ..data.text import read_text
    from .base import RewardError
    from .client import TOKEN
    from .registry import load

    try:
        import secrets

        import uvicorn

        from .server import build_app
    except ImportError as error:
        raise fail(f'{error.name} is not installed: pip install "diffusion-nft[server]"') from None
    with failing(ValueError, OSError, RewardError):
        token = read_text(token_file, "token-file").strip() if token_file else os.environ.get(TOKEN, "").strip()
        if token_file and not token:
            raise ValueError(f"token-file: {token_file} is empty, accepted is a file with the token")
        usable_device(device)
        options = reward_options(settings or [], names)
        # A module's ``a:B`` is served as B.
        short = [name.rpartition(":")[2] for name in names]
        if len(set(short)) < len(short):
            raise ValueError(f"names: got {', '.join(short)}, accepted are different ones")
        _check_address(host, port)
        served = {s: load(name, options[name], device=device) for s, name in zip(short, names, strict=True)}
        shown = token or secrets.token_urlsafe()
        app = build_app(served, shown, max_bytes=max_mib * 2**20, max_waiting=max_waiting, max_pictures=max_pictures)
    if not token:
        say(f"export {TOKEN}={shown}")
    say(f"serving {', '.join(f'http://{host}:{port}/{name}' for name in served)}")
    uvicorn.run(app, host=host, port=port, log_level="warning")
