"""What every benchmark writes beside its numbers: the versions, the device and the date they were made with."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def write(path: Path, result: Mapping[str, object], *, device: str = "cpu", beside: tuple[str, ...] = ()) -> None:
    """Write a result as JSON. `beside`: distributions, other than torch, whose versions matter to it."""
    where = {
        "torch": torch.__version__,
        **{name: version(name) for name in beside},
        "python": platform.python_version(),
        "device": device if device != "cpu" else f"cpu: {cpu_name()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, **where}, indent=2) + "\n", "utf-8")


def cpu_name() -> str:
    """The processor's name as Linux has it, and whether it multiplies matrices of bfloat16 by itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in names.get("flags", "")), "")
    return f"{names.get('model name', platform.machine())} ({best})"
