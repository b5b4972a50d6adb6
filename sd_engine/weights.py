"""Weights: a diffusers folder, or an original single-file checkpoint, to a model that is ready to draw.

Modules are built on `meta` (no memory, no initialization), files are mapped into memory, and the mapped tensors are
assigned: so loading costs one read, and CPU processes that load the same file in its own dtype share its pages.
Loading is strict: a key that is missing, unexpected or of another shape is an error that lists the keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from sd_engine import keymaps
from sd_engine.clip import ClipTextEncoder
from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.errors import WeightsError
from sd_engine.model import SD1, Configs, Model
from sd_engine.offload import Place, pin
from sd_engine.schedules import NoiseSchedule
from sd_engine.tensorfile import fill, listed, opened
from sd_engine.tokenizer import Tokenizer
from sd_engine.unet import UNet
from sd_engine.vae import Vae

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_FILES = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}

Config = TypeVar("Config")


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    *,
    tokenizer: Path | str | None = None,
    configs: Configs = SD1,
    offload: str = "resident",
) -> Model:
    """Load a diffusers folder, or a single-file `.safetensors` checkpoint with the original (LDM) names.

    A single file has no tokenizer and does not say what it is made of: `tokenizer` is a folder with `vocab.json` and
    `merges.txt` (none given: `tokenizer/` beside the file), and `configs` describes the model. A folder has both.
    Raises InvalidDevice for a device, dtype or mode of offload that does not exist or is not here, and WeightsError:
    what is missing, unreadable, unsupported or does not fit, in which file, and what to do.
    """
    path, place = Path(path), Place.pick(device, dtype, offload)
    if path.is_dir():
        return _load_folder(path, place)
    if not path.exists():
        raise WeightsError(f"there is no model at {path}; give a diffusers folder or a .safetensors checkpoint")
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} is neither a folder nor a .safetensors file; convert the checkpoint to safetensors")
    return _load_checkpoint(path, place, _tokenizer_folder(path, tokenizer), configs)


def _load_folder(folder: Path, place: Place) -> Model:
    _check_pipeline(folder)
    configs = _read_configs(folder)
    model = _empty_model(folder.name, folder / "tokenizer", configs, place)
    for component, module in model.modules.items():
        with opened(_weights_file(folder / component)) as file:
            names = {key: key for key in file.keys}
            fill(module, file, names, keymaps.DIFFUSERS[component], place.at_rest(component))
    return _ready(model)


def _load_checkpoint(path: Path, place: Place, tokenizer: Path, configs: Configs) -> Model:
    model = _empty_model(path.stem, tokenizer, configs, place)
    with opened(path) as file:
        keys = [key for key in file.keys if not keymaps.is_ldm_leftover(key)]
        strangers = [key for key in keys if not key.startswith(tuple(keymaps.LDM_PREFIXES.values()))]
        if strangers:
            raise WeightsError(
                f"{path} is not an SD 1.x checkpoint with the original names: {listed('unexpected', strangers)}"
            )
        maps = keymaps.ldm(configs.unet, configs.vae)
        for component, module in model.modules.items():
            prefix = keymaps.LDM_PREFIXES[component]
            names = {key: key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
            fill(module, file, names, maps[component], place.at_rest(component))
    return _ready(model)


def _empty_model(name: str, tokenizer: Path, configs: Configs, place: Place) -> Model:
    """The model with its modules on `meta`."""
    words = Tokenizer.from_folder(tokenizer, max_tokens=configs.text.max_tokens)
    if words.vocab_size > configs.text.vocab_size:
        raise WeightsError(
            f"the tokenizer in {tokenizer} has {words.vocab_size} tokens, the text encoder only "
            f"{configs.text.vocab_size}; use the tokenizer that the model was trained with"
        )
    with torch.device("meta"):
        text_encoder, unet, vae = ClipTextEncoder(configs.text), UNet(configs.unet), Vae(configs.vae)
    return Model(name, words, text_encoder, unet, vae, configs.schedule, place.device, place.dtype, place.offload)


def _ready(model: Model) -> Model:
    for module in model.modules.values():
        module.eval().requires_grad_(False)
    pin(model.modules, model.device, model.offload)
    return model


def _read_configs(folder: Path) -> Configs:
    return Configs(
        text=_read_config(folder / "text_encoder" / "config.json", ClipConfig.from_dict),
        unet=_read_config(folder / "unet" / "config.json", UNetConfig.from_dict),
        vae=_read_config(folder / "vae" / "config.json", VaeConfig.from_dict),
        schedule=_read_config(folder / "scheduler" / "scheduler_config.json", NoiseSchedule.from_config),
    )


def _read_config(path: Path, parse: Callable[[Mapping[str, Any]], Config]) -> Config:
    """Parse a JSON file of the folder; whatever is wrong with it, the error names the file."""
    settings = _read_json(path)
    try:
        return parse(settings)
    except KeyError as error:
        raise WeightsError(f"{path} lacks the setting {error.args[0]!r}") from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; a diffusers folder has one: copy it from the model's source") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} does not hold a JSON object; download it again")
    return settings


def _check_pipeline(folder: Path) -> None:
    """`model_index.json` may be left out; if it is there, it must name a pipeline that this engine is."""
    index = folder / "model_index.json"
    if not index.exists():
        return
    pipeline = _read_json(index).get("_class_name", _PIPELINES[0])
    if pipeline not in _PIPELINES:
        raise WeightsError(f"{index}: {pipeline} is not supported (supported: {', '.join(_PIPELINES)})")


def _weights_file(component: Path) -> Path:
    """The component's safetensors file; its fp16 variant when that is the only one."""
    stem = _FILES[component.name]
    candidates = [component / f"{stem}.safetensors", component / f"{stem}.fp16.safetensors"]
    for path in candidates:
        if path.is_file():
            return path
    raise WeightsError(
        f"{component} has neither {candidates[0].name} nor {candidates[1].name}; "
        "copy it from the model's source, or save the model as safetensors in one file"
    )


def _tokenizer_folder(checkpoint: Path, given: Path | str | None) -> Path:
    folder = checkpoint.parent / "tokenizer" if given is None else Path(given)
    if not folder.is_dir():
        raise WeightsError(
            f"a single-file checkpoint has no tokenizer, and {folder} is not a folder; pass tokenizer=FOLDER with "
            "vocab.json and merges.txt, or put them in tokenizer/ beside the file"
        )
    return folder
