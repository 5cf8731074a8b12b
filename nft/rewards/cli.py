"""Commands about rewards: ``nft rewards``."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from .base import install_hint, missing_packages
from .registry import find, known


def _interval(low: float, high: float) -> str:
    return f"{'(-inf' if math.isinf(low) else f'[{low:g}'}, {'inf)' if math.isinf(high) else f'{high:g}]'}"


def rewards() -> None:
    """List the rewards, with what is installed and what is missing."""
    listing = Table("name", "range", "needs", "device", "state", "what it is")
    for name in known():
        try:
            kind = find(name)
        except (ImportError, ValueError) as error:
            listing.add_row(name, "", "", "", f"broken: {error}", "")
            continue
        missing = missing_packages(kind)
        state = f"{', '.join(missing)} missing: {install_hint(kind)}" if missing else "installed"
        needs = ", ".join(("prompt", *kind.needs))
        device = "any" if kind.uses_device else "CPU"
        about = (kind.__doc__ or "").strip().partition("\n")[0]
        # Brackets of an extra are not markup.
        listing.add_row(name, _interval(*kind.range), needs, device, state.replace("[", r"\["), about)
    Console().print(listing)
