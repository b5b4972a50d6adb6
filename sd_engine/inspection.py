"""What is in a file or folder of weights, and is it sound: without loading a model, whatever it turns out to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from sd_engine.checkpoint import Checkpoint, Choice, opened_checkpoint
from sd_engine.clip import ClipTextEncoder
from sd_engine.errors import WeightsError
from sd_engine.families import kind
from sd_engine.filling import Part, matched
from sd_engine.finite import is_finite
from sd_engine.keymaps_ldm import EMA_PREFIX
from sd_engine.layouts import SUFFIXES, opened
from sd_engine.namings import COMPONENT_FILE, WORDS, recognised, stranger
from sd_engine.offload import Component
from sd_engine.tensorfile import TensorFile, listed
from sd_engine.unet import UNet
from sd_engine.vae import Vae

_NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class PartInspection:
    """A component in a file: whose names it has, how many tensors and numbers, and how many tensors of each dtype."""

    component: str
    file: Path
    naming: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a path holds. `layout` and `kind` are words ("single file", "SD 1.x inpainting", "LoRA").

    ema: whether averaged weights are there too. in_channels and context_width are the U-Net's, size is the side of the
    pictures it was trained with, in pixels. What cannot be told is None. problems: why it cannot be loaded, in
    sentences; none if it can, as far as names and shapes show (`verify` also reads the numbers).
    """

    path: Path
    layout: str
    kind: str
    parts: tuple[PartInspection, ...] = ()
    ema: bool = False
    in_channels: int | None = None
    context_width: int | None = None
    size: int | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    problems: tuple[str, ...] = field(default=())


def inspect(path: Path | str, choice: Choice | None = None) -> Inspection:
    """Look at names, shapes and dtypes; no tensor is read. Whatever is wrong is told in `problems`, never raised."""
    path = Path(path)
    try:
        with opened_checkpoint(path, choice or Choice()) as checkpoint:
            return _inspection(checkpoint)
    except (WeightsError, OSError) as error:
        return _no_model(path, str(error))


def verify(path: Path | str, choice: Choice | None = None) -> list[str]:
    """Hold every name and shape against the model, and read every number. Returns the problems, each a sentence."""
    try:
        with opened_checkpoint(Path(path), choice or Choice()) as checkpoint:
            return _misfits(checkpoint) or [problem for part in checkpoint.parts for problem in _not_finite(part)]
    except (WeightsError, OSError) as error:
        return [str(error)]


def _inspection(checkpoint: Checkpoint) -> Inspection:
    unet, schedule = checkpoint.configs.unet, checkpoint.configs.schedule
    return Inspection(
        path=checkpoint.path,
        layout=checkpoint.layout,
        kind=kind(checkpoint.configs),
        parts=tuple(_part(part.component, part.naming, part.file, tuple(part.names)) for part in checkpoint.parts),
        ema=checkpoint.has_ema,
        in_channels=unet.in_channels,
        context_width=unet.context_width,
        size=unet.sample_size * checkpoint.configs.vae.factor,
        prediction=schedule.prediction,
        zero_snr=schedule.zero_snr,
        problems=tuple(_misfits(checkpoint)),
    )


def _misfits(checkpoint: Checkpoint) -> list[str]:
    configs = checkpoint.configs
    with torch.device("meta"):
        modules = {
            "text_encoder": ClipTextEncoder(configs.text), "unet": UNet(configs.unet), "vae": Vae(configs.vae)
        }  # fmt: skip
    problems = []
    for part in checkpoint.parts:
        try:
            matched(modules[part.component], part)
        except WeightsError as error:
            problems.append(str(error))
    return problems


def _not_finite(part: Part) -> Iterator[str]:
    """At most one sentence for a component: a damaged file has many damaged tensors."""
    damaged = []
    for key in part.wanted:
        tensor = part.file.tensor(key)
        if not is_finite(tensor):
            damaged.append(key)
        part.file.forget(key, tensor)
    if damaged:
        yield (
            f"{part.file.path} is damaged, these have numbers that are not finite (NaN or infinity): "
            f"{listed('tensors', damaged)}; download it again"
        )


def _part(component: str, naming: str, file: TensorFile, keys: tuple[str, ...]) -> PartInspection:
    dtypes = Counter(_dtype_name(file.dtype(key)) for key in keys)
    numbers = {key: prod(file.shape(key)) for key in keys}
    nbytes = sum(count * file.dtype(key).itemsize for key, count in numbers.items())
    return PartInspection(component, file.path, naming, len(keys), sum(numbers.values()), nbytes, dict(dtypes))


def _dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _no_model(path: Path, problem: str) -> Inspection:
    """What can be said about a path that is no whole model."""
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        layout = "folder" if path.is_dir() else "file" if path.exists() else "nothing"
        return Inspection(path, layout, "unknown", problems=(problem,))
    with ExitStack() as stack:
        try:
            file = stack.enter_context(opened(path))
            ema = any(key.startswith(EMA_PREFIX) for key in file.keys)
            return Inspection(path, "file", _kind(file), _parts(file), ema, problems=(problem,))
        except (WeightsError, OSError):  # it cannot be opened, or has numbers of a kind that nobody here knows
            return Inspection(path, "file", "unknown", problems=(problem,))


def _kind(file: TensorFile) -> str:
    other = stranger((*file.keys, *file.hints))
    if other is not None:
        return other.kind
    found = recognised(file.keys, COMPONENT_FILE)
    return " and ".join(WORDS[component] for component in found) or "unknown"


def _parts(file: TensorFile) -> tuple[PartInspection, ...]:
    found: dict[Component, tuple[str, tuple[str, ...]]] = {
        component: (naming.name, tuple(key for key in file.keys if key.startswith(naming.prefix)))
        for component, naming in recognised(file.keys, COMPONENT_FILE).items()
    }
    if not found:
        return (_part("tensors", "unknown", file, file.keys),) if file.keys else ()
    return tuple(_part(component, naming, file, keys) for component, (naming, keys) in found.items())
