"""What every benchmark writes beside its numbers: the code, versions, device and date that they were made with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sd_engine.devices import DTYPES, computes

RESULTS = Path(__file__).parent / "results"


def result_file(name: str, *, quick: bool) -> Path:
    """Where a result goes that is not told where: a quick one says nothing about speed, and replaces none that does."""
    return RESULTS / "quick" / name if quick else RESULTS / name


def multiplied_here() -> list[str]:
    """The dtypes that a benchmark of a CPU is of: float32, and bfloat16 where the CPU multiplies that by itself."""
    return [name for name in ("fp32", "bf16") if computes(DTYPES[name])]


def write(path: Path, result: Mapping[str, object], *, device: str = "cpu", beside: tuple[str, ...] = ()) -> None:
    """Write a result as JSON. `beside`: distributions, other than torch, whose versions matter, if they are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one go: who is ended meanwhile leaves the file as it was.
    beginning = path.with_suffix(".part")
    beginning.write_text(json.dumps({**result, **stamp(device, beside)}, indent=2) + "\n", "utf-8")
    beginning.replace(path)


def stamp(device: str = "cpu", beside: tuple[str, ...] = ()) -> dict[str, object]:
    """What figures were made by and on."""
    return {
        "commit": commit(),
        "torch": torch.__version__,
        **_cuda(),
        **{name: _version(name) for name in beside},
        "python": platform.python_version(),
        "device": device if device != "cpu" else f"cpu: {cpu_name()}, {os.cpu_count()} cores",
        "date": datetime.now(UTC).date().isoformat(),
    }


def commit() -> str | None:
    """The code that was measured, with "+" where it was changed since; None outside a checkout."""
    git = ["git", "-C", str(RESULTS.parent.parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", ":(exclude)benchmarks/results"]
        changed = subprocess.run(changes, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + "+" * bool(changed)


def _cuda() -> dict[str, object]:
    """What the figures of a GPU depend on besides."""
    if not torch.cuda.is_available():
        return {}
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": _version("triton")}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
