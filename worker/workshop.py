"""The torch half of a worker's start: device, models, engine. Runs inside the engine's thread."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import SettingsError
from sd_engine import Engine, Model, WeightsError, load_model, shipped_model
from worker.engine_thread import Workshop

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """``device``: auto, cpu, mps, cuda or cuda:N. ``max_units``: U-Net rows x latent area of one call, None for the
    engine's own. ``threads``: CPU threads of one operation, None for torch's own."""

    device: str = "auto"
    max_units: int | None = None
    threads: int | None = None


def open_workshop(models: Mapping[str, Path | str], options: TorchOptions) -> Workshop:
    """Load every model. One that cannot be loaded is reported and its jobs fail at once; with none left it is an error.

    Raises ``SettingsError`` for a device that is not there, or when no model can be loaded.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)  # must come before the first operation
    device = pick_device(options.device)
    loaded: dict[str, Model] = {}
    broken: dict[str, str] = {}
    for name, path in models.items():
        try:
            loaded[name] = load_model(_folder(path), device=device, dtype=dtype_of(device))
        except (WeightsError, OSError) as error:
            broken[name] = " ".join(str(error).split())
            log.error("model %s cannot be loaded: %s", name, broken[name])
    if not loaded:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items())
        raise SettingsError(f"NIGHTSHIFT_MODELS: no model can be loaded ({reasons})")
    return Workshop(
        make_engine=lambda: Engine(loaded, max_units=options.max_units),
        device=str(device),
        models=tuple(models),
        broken=broken,
        guard=torch.inference_mode,  # thread-local, so it is entered in this thread
    )


def _folder(path: Path | str) -> Path:
    return shipped_model() if path == "shipped" else Path(path)


def pick_device(name: str) -> torch.device:
    """``auto``: cuda, then mps, then cpu. Raises ``SettingsError`` for a device that this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise SettingsError(f"--device {name}: this machine has {gpus} CUDA devices; choose another or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError("--device mps: torch finds no Apple GPU here; choose cpu or auto")
    return device


def dtype_of(device: torch.device) -> torch.dtype:
    """Half precision where it is fast; on CPUs plain float32, which is what the reference pictures were compared in."""
    return torch.float16 if device.type == "cuda" else torch.float32


def gpu_names() -> list[str]:
    """``cuda:0``, ... as ``--device`` takes them. Makes no CUDA context in this process."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
