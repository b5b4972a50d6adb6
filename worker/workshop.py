"""The torch half of a worker's start: device, models, engine. Runs inside the engine's thread."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import SettingsError
from sd_engine import Engine, Model, WeightsError, load_model, shipped_model
from sd_engine.devices import devices_here
from sd_engine.errors import InvalidDevice
from sd_engine.offload import Place
from worker.engine_thread import Workshop
from worker.model_entry import ShelfError, Source, source_at

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """``device``: auto, cpu, mps, cuda or cuda:N. ``dtype``: auto, fp32, fp16 or bf16. ``offload``: resident, idle or
    sequential. ``deterministic``: packs of a fixed size. ``max_units``: U-Net rows x latent area of one call, None for
    the engine's own. ``threads``: CPU threads of one operation, None for torch's own."""

    device: str = "auto"
    max_units: int | None = None
    threads: int | None = None
    dtype: str = "auto"
    offload: str = "resident"
    deterministic: bool = False


def open_workshop(models: Mapping[str, Path | str], options: TorchOptions) -> Workshop:
    """Load every model. One that cannot be loaded is reported and its jobs fail at once; with none left it is an error.

    Raises ``SettingsError`` for a device that is not here, or when no model can be loaded.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)  # must come before the first operation
    place = _place(options)
    loaded: dict[str, Model] = {}
    broken: dict[str, str] = {}
    for name, path in models.items():
        try:
            source = _source(path)
            loaded[name] = load_model(source.path, place.device, place.dtype, offload=place.offload, **source.options())
        except (WeightsError, ShelfError, OSError) as error:
            broken[name] = " ".join(str(error).split())
            log.error("model %s cannot be loaded: %s", name, broken[name])
    if not loaded:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in broken.items()) or "it names none"
        raise SettingsError(f"NIGHTSHIFT_MODELS: no model can be loaded ({reasons})")
    return Workshop(
        make_engine=lambda: Engine(loaded, max_units=options.max_units, deterministic=options.deterministic),
        device=str(place.device),
        models=tuple(models),
        broken=broken,
        guard=torch.inference_mode,  # thread-local, so it is entered in this thread
    )


def _source(path: Path | str) -> Source:
    return Source(shipped_model()) if path == "shipped" else source_at(Path(path))


def _place(options: TorchOptions) -> Place:
    try:
        return Place.pick(options.device, options.dtype, options.offload)
    except InvalidDevice as error:
        remedy = error.remedy and f"; {error.remedy}"
        raise SettingsError(f"--{error.field} {error.value}: {error.allowed}{remedy}") from None


def gpu_names() -> list[str]:
    """``cuda:0``, ... as ``--device`` takes them. Makes no CUDA context in this process."""
    return [name for name in devices_here() if name.startswith("cuda")]
