"""The worker's checks of `nightshift doctor`: torch, the device and the models. Without torch they are skipped."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from jobs.checks import Finding, Mark, above_floor, looked
from jobs.settings import Settings
from sd_engine import shipped_model
from sd_engine.devices import devices_here, pick_device
from worker.model_check import check_names
from worker.model_entry import Source, source_at
from worker.model_shelf import served
from worker.models_show import size

#: Older ones run code out of a checkpoint although they promise not to.
FLOORS = {"torch": (2, 10)}


def checks(settings: Settings) -> Iterator[Finding]:
    """All that the worker's half needs on this machine."""
    for package, floor in FLOORS.items():
        yield above_floor(package, floor)
    yield _device()
    yield from looked("models", partial(_models, settings), "nightshift models list")


def _device() -> Finding:
    device = pick_device("auto")
    here = ", ".join(devices_here())
    if device.type != "cuda":
        return Finding("device", Mark.ok, f"auto takes {device}; this machine has {here}")
    properties = torch.cuda.get_device_properties(device.index or 0)
    memory = size(properties.total_memory)
    return Finding("device", Mark.ok, f"auto takes {device} ({properties.name}, {memory}); this machine has {here}")


def _models(settings: Settings) -> Iterator[Finding]:
    for name, place in served(settings).items():
        remedy = f"nightshift models verify {name}; take it out of NIGHTSHIFT_MODELS, or add it anew"
        yield from looked(f"model {name}", partial(_model, name, place), remedy)


def _model(name: str, place: Path | str) -> Iterator[Finding]:
    source = Source(shipped_model()) if place == "shipped" else source_at(Path(place))
    found = check_names(source)
    total = sum(part.nbytes for part in found.parts)
    yield Finding(f"model {name}", Mark.ok, f"{found.kind or 'a model'}, {size(total)} of weights, by names and shapes")
