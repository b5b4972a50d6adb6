"""A checkpoint in whatever layout: its configurations, its tokenizer, and each component's tensors with their names.

Layouts: the diffusers folder, the original single file (LDM names), and a folder of bare component files
(`unet.safetensors`, `text_encoder.safetensors`, `vae.safetensors`, `tokenizer/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from sd_engine import keymaps, keymaps_ldm
from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.errors import WeightsError
from sd_engine.families import detect, trained
from sd_engine.filling import Part
from sd_engine.layouts import SUFFIXES, bare_file, component_file, opened, read_json
from sd_engine.model import Configs
from sd_engine.namings import COMPONENT_FILE, SINGLE_FILE, WORDS, Naming, recognised, stranger
from sd_engine.offload import Component
from sd_engine.schedules import NoiseSchedule
from sd_engine.tensorfile import TensorFile, listed

Layout = Literal["diffusers folder", "single file", "component files"]
PIPELINES: Final = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Choice:
    """What is taken of a checkpoint that offers several weights, and what it does not say about itself.

    variant: of a diffusers folder's files ("fp16"). ema: the averaged U-Net of a single file instead of the plain one.
    vae: another VAE, in any layout. configs: of a single file or bare components; None: told by their shapes.
    prediction, zero_snr: how the model was trained; None: what `families.py` finds.
    """

    variant: str | None = None
    ema: bool = False
    vae: Path | None = None
    configs: Configs | None = None
    prediction: str | None = None
    zero_snr: bool | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. `tokenizer` is where its tokenizer would be; a single file has one beside it at best."""

    path: Path
    layout: Layout
    configs: Configs
    parts: tuple[Part, ...]
    tokenizer: Path
    has_ema: bool = False

    @property
    def unet(self) -> Part:
        """The U-Net's part."""
        return next(part for part in self.parts if part.component == "unet")

    @property
    def name(self) -> str:
        """The model's name: the folder's or file's."""
        return self.path.name if self.path.is_dir() else self.path.stem


@contextmanager
def opened_checkpoint(path: Path, choice: Choice) -> Iterator[Checkpoint]:
    """Open a model's files; no tensor is read yet. Raises WeightsError for what is no whole model."""
    with ExitStack() as stack:
        checkpoint = _found(path, choice, stack)
        configs = trained(checkpoint.configs, choice.prediction, choice.zero_snr)
        yield _with_vae(replace(checkpoint, configs=configs), choice, stack)


def _found(path: Path, choice: Choice, stack: ExitStack) -> Checkpoint:
    if not path.exists():
        raise WeightsError(
            f"there is no model at {path}; give a diffusers folder, a checkpoint ({', '.join(SUFFIXES)}), or a folder "
            "with unet, text_encoder and vae files"
        )
    if not path.is_dir():
        return _single_file(path, choice, stack)
    if bare_file(path, "unet") is not None:
        return _component_files(path, choice, stack)
    return _diffusers_folder(path, choice, stack)


# --- the diffusers folder


def _diffusers_folder(folder: Path, choice: Choice, stack: ExitStack) -> Checkpoint:
    _refuse_ema(folder, choice)
    _check_pipeline(folder)
    configs = _read_configs(folder, choice)
    parts = [_folder_part(folder / each, each, choice.variant, stack) for each in _wanted(choice)]
    return Checkpoint(folder, "diffusers folder", configs, tuple(parts), folder / "tokenizer")


def _folder_part(folder: Path, component: Component, variant: str | None, stack: ExitStack) -> Part:
    file = stack.enter_context(opened(component_file(folder, component, variant)))
    return Part(component, file, {key: key for key in file.keys}, keymaps.DIFFUSERS[component], "diffusers")


def _read_configs(folder: Path, choice: Choice) -> Configs:
    text = read_config(folder / "text_encoder" / "config.json", ClipConfig.from_dict)
    unet = read_config(folder / "unet" / "config.json", UNetConfig.from_dict)
    vae = _vae_config(choice.vae) or read_config(folder / "vae" / "config.json", VaeConfig.from_dict)
    schedule = read_config(folder / "scheduler" / "scheduler_config.json", NoiseSchedule.from_config)
    with _about(folder):
        return Configs(text, unet, vae, schedule)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Parts that do not belong together are told with the place that they were found in."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}; take the parts of one model") from error


def read_config(path: Path, parse: Callable[[Mapping[str, Any]], Config]) -> Config:
    """Parse a JSON file of a folder; whatever is wrong with it, the WeightsError names the file."""
    settings = read_json(path)
    try:
        return parse(settings)
    except KeyError as error:
        raise WeightsError(f"{path} lacks the setting {error.args[0]!r}") from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a setting of the wrong kind ({error}); download it again") from error


def _check_pipeline(folder: Path) -> None:
    """`model_index.json` may be left out; if it is there, it must name a pipeline that this engine is."""
    index = folder / "model_index.json"
    if not index.exists():
        return
    pipeline = read_json(index).get("_class_name", PIPELINES[0])
    if pipeline not in PIPELINES:
        raise WeightsError(f"{index}: {pipeline} is not supported (supported: {', '.join(PIPELINES)})")


# --- the original single file


def _single_file(path: Path, choice: Choice, stack: ExitStack) -> Checkpoint:
    file = stack.enter_context(opened(path))
    keys = tuple(key for key in file.keys if not keymaps_ldm.is_leftover(key))
    namings = recognised(keys, SINGLE_FILE)
    _check_whole(file, namings, choice)
    configs = choice.configs or detect(file, namings["unet"], choice.prediction)
    parts = tuple(_part(file, namings[each], configs, keys) for each in _wanted(choice))
    claimed = [naming.prefix for naming in namings.values()]
    strange = [key for key in keys if not key.startswith(tuple(claimed))]
    if strange:
        raise WeightsError(f"{path} is not a checkpoint with the original names: {listed('unexpected', strange)}")
    has_ema = any(key.startswith(keymaps_ldm.EMA_PREFIX) for key in file.keys)
    if choice.ema:
        parts = tuple(_averaged(part) if part.component == "unet" else part for part in parts)
    return Checkpoint(path, "single file", configs, parts, path.parent / "tokenizer", has_ema)


def _check_whole(file: TensorFile, namings: Mapping[Component, Naming], choice: Choice) -> None:
    """Raises WeightsError for a file that is something else, or lacks a component."""
    other = stranger((*file.keys, *file.hints))
    if other is not None:
        raise WeightsError(f"{file.path} is {other.said}, not a Stable Diffusion 1.x or 2.x model; {other.remedy}")
    lacking = [WORDS[component] for component in _wanted(choice) if component not in namings]
    alone = [WORDS[component] for component in recognised(file.keys, COMPONENT_FILE)]
    if lacking and len(alone) == 1:
        raise WeightsError(f"{file.path} is a {alone[0]} alone, not a whole model; {_ALONE[alone[0]]}")
    if lacking and not namings:
        found = listed("unexpected", file.keys) or "it holds no tensors"
        raise WeightsError(f"{file.path} is no Stable Diffusion checkpoint: {found}; take another file")
    if lacking:
        remedy = "give one as vae=" if lacking == ["VAE"] else "take the whole checkpoint from its source"
        raise WeightsError(f"{file.path} has no {' and no '.join(lacking)}; {remedy}")


_FOLDER: Final = "put it into a folder with the others, as {}.safetensors beside {}, and load the folder"
_ALONE: Final[Mapping[str, str]] = {
    "VAE": "load the model that it belongs to, with this file as vae=",
    "U-Net": _FOLDER.format("unet", "text_encoder.safetensors, vae.safetensors and tokenizer/"),
    "text encoder": _FOLDER.format("text_encoder", "unet.safetensors, vae.safetensors and tokenizer/"),
}


def _averaged(part: Part) -> Part:
    """The averaged weights in the place of the plain ones. Raises WeightsError if the file has none, or not all."""
    there = set(part.file.keys)
    names = {keymaps_ldm.ema_key(name): name for name in part.names.values()}
    absent = [key for key in names if key not in there]
    if absent:
        raise WeightsError(
            f"{part.file.path} has no averaged weights of its U-Net (ema=True): {listed('missing', absent)}; "
            "load it with ema=False"
        )
    return replace(part, names=names)


def _refuse_ema(path: Path, choice: Choice) -> None:
    if choice.ema:
        raise WeightsError(
            f"{path} has no averaged weights (ema=True), only a single-file checkpoint may; load it with ema=False"
        )


# --- a folder of component files, and a VAE given separately


def _component_files(folder: Path, choice: Choice, stack: ExitStack) -> Checkpoint:
    _refuse_ema(folder, choice)
    found = {each: _component(_bare(folder, each), each, stack) for each in _wanted(choice)}
    unet_file, unet = found["unet"]
    configs = choice.configs or detect(unet_file, unet, choice.prediction)
    parts = tuple(_part(file, naming, configs, file.keys) for file, naming in found.values())
    return Checkpoint(folder, "component files", configs, parts, folder / "tokenizer")


def _bare(folder: Path, component: Component) -> Path:
    path = bare_file(folder, component)
    if path is None:
        raise WeightsError(f"{folder} has no {component}.safetensors beside its U-Net; copy it there")
    return path


def _component(path: Path, component: Component, stack: ExitStack) -> tuple[TensorFile, Naming]:
    file = stack.enter_context(opened(path))
    found = recognised(file.keys, COMPONENT_FILE)
    if component in found:
        return file, found[component]
    other = stranger((*file.keys, *file.hints))
    kind = other.kind if other is not None else " and ".join(WORDS[each] for each in found) or "something else"
    raise WeightsError(f"{path} holds no {WORDS[component]} but {kind}; give the file of a {WORDS[component]}")


def _part(file: TensorFile, naming: Naming, configs: Configs, keys: tuple[str, ...]) -> Part:
    names = {key: key.removeprefix(naming.prefix) for key in keys if key.startswith(naming.prefix)}
    return Part(naming.component, file, names, naming.keymap(configs), naming.name)


def _with_vae(checkpoint: Checkpoint, choice: Choice, stack: ExitStack) -> Checkpoint:
    """The checkpoint with the VAE that was given separately, if one was."""
    path = choice.vae
    if path is None:
        return checkpoint
    if not path.exists():
        raise WeightsError(f"there is no VAE at {path} (vae=); give a folder or a file ({', '.join(SUFFIXES)})")
    vae = _vae_config(path) or checkpoint.configs.vae
    with _about(path):
        configs = replace(checkpoint.configs, vae=vae)
    if path.is_dir():
        part = _folder_part(_vae_folder(path), "vae", choice.variant, stack)
    else:
        file, naming = _component(path, "vae", stack)
        part = _part(file, naming, configs, file.keys)
    return replace(checkpoint, configs=configs, parts=(*checkpoint.parts, part))


def _vae_folder(path: Path) -> Path:
    return path / "vae" if (path / "vae").is_dir() else path


def _vae_config(path: Path | None) -> VaeConfig | None:
    """The configuration beside a VAE that was given separately; None where there is none: the model's own then."""
    if path is None or not path.is_dir():
        return None
    return read_config(_vae_folder(path) / "config.json", VaeConfig.from_dict)


def _wanted(choice: Choice) -> tuple[Component, ...]:
    """The components that the model itself must have."""
    return ("text_encoder", "unet") if choice.vae is not None else ("text_encoder", "unet", "vae")
