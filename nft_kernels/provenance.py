"""Where a figure comes from."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device, **packages: str) -> dict[str, Any]:
    """What a figure has to carry: date, device and versions, of torch, Python and ``packages``."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        listed = Path("/proc/cpuinfo")
        lines = listed.read_text().splitlines() if listed.is_file() else []
        model = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
        name = f"{model}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "versions": {**packages, "torch": torch.__version__, "python": platform.python_version()},
    }


def write_report(
    path: Path,
    command: str,
    device: torch.device,
    figures: dict[str, Any],
    arguments: Sequence[str] | None = None,
    **packages: str,
) -> None:
    """``figures`` as JSON with their provenance and the command; its ``arguments`` are by default this process'."""
    line = " ".join([command, *(sys.argv[1:] if arguments is None else arguments)])
    report = {"command": line, **provenance(device, **packages), **figures}
    path.write_text(json.dumps(report, indent=1) + "\n")
