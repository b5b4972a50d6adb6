"""The files that `benchmarks.cold` loads: SD 1.5 at full size with numbers that say nothing, in each layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from sd_engine import shipped_model
from sd_engine.clip import ClipTextEncoder
from sd_engine.convert import convert
from sd_engine.keymaps import diffusers_name
from sd_engine.model import SD1
from sd_engine.unet import UNet
from sd_engine.vae import Vae
from tests.engine import ldm_names

TOKENIZER = shipped_model() / "tokenizer"
_READ = 2**24
_TYPES = {"fp32": torch.float32, "fp16": torch.float16}


def write_single(path: Path, dtype: str) -> Path:
    """A checkpoint under the original names, by its suffix safetensors or a pickle; a random number for each tensor."""
    with torch.device("meta"):
        modules = {"text_encoder": ClipTextEncoder(SD1.text), "unet": UNet(SD1.unet), "vae": Vae(SD1.vae)}
    states = [
        {diffusers_name(component, name): tensor for name, tensor in module.state_dict().items()}
        for component, module in modules.items()
    ]
    names = ldm_names.checkpoint(*states)
    tensors = {name: torch.randn(1, dtype=_TYPES[dtype]).expand(meta.shape).clone() for name, meta in names.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def write_folder(single: Path, folder: Path) -> Path:
    """The same as a diffusers folder, which the reference loads, too."""
    return convert(single, folder, tokenizer=TOKENIZER)


def remember(path: Path) -> None:
    """Read the files of a model once, so that they are in the page cache."""
    for file in _files(path):
        with file.open("rb", buffering=0) as opened:
            while opened.read(_READ):
                pass


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]


def forget(path: Path) -> None:
    """Let the page cache drop the files of a model, so that they are read from the disk again.

    The machine that a virtual one runs on may still have them in its memory.
    """
    for file in _files(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # only what is on the disk can be dropped
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
