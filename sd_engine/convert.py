"""Convert a model in any layout to a diffusers folder, which this engine and the reference library both load."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from sd_engine.checkpoint import Choice, opened_checkpoint
from sd_engine.errors import WeightsError
from sd_engine.filling import Part
from sd_engine.folder_writer import write_folder, write_tiny_decoder
from sd_engine.model import Configs
from sd_engine.offload import Place
from sd_engine.weights import TINY_DECODER_FOLDER, filled_model, own_tiny_decoder, tokenizer_folder

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json",
)  # fmt: skip


def convert(
    source: Path | str,
    target: Path | str,
    dtype: torch.dtype | str | None = None,
    *,
    tokenizer: Path | str | None = None,
    configs: Configs | None = None,
    variant: str | None = None,
    ema: bool = False,
    vae: Path | str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    tiny_decoder: Path | str | None = None,
) -> Path:
    """Write the model at `source` to the folder `target`, with tokenizer and tiny decoder, and return the folder.

    dtype: of the weights there; none given: that of the U-Net in `source`. The others are `load_model`'s. The folder
    appears when it is whole. Raises WeightsError for what `load_model` refuses, and for a target that is there already
    or cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise WeightsError(f"{target} is there already; give a new folder")
    choice = Choice(variant, ema, None if vae is None else Path(vae), configs, prediction, zero_snr)
    with opened_checkpoint(source, choice) as checkpoint:
        found, words = checkpoint.configs, tokenizer_folder(checkpoint, tokenizer)
        place = Place.pick("cpu", dtype or _stored_dtype(checkpoint.unet), "resident")
        decoder = own_tiny_decoder(checkpoint, tiny_decoder, place)
        model = filled_model(checkpoint, words, place, tiny_decoder=decoder)
    unfinished = target.absolute().with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_folder(unfinished, found, model.modules, place.dtype)
        copy_tokenizer(words, unfinished / "tokenizer")
        if decoder is not None:
            write_tiny_decoder(unfinished / TINY_DECODER_FOLDER, decoder, place.dtype)
        unfinished.replace(target)  # an empty folder gives way
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{target} cannot be written ({error}); make room there, or choose another place") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files that a tokenizer is made of, and nothing else that lies beside them."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _stored_dtype(part: Part) -> torch.dtype:
    dtype = part.file.dtype(next(iter(part.names)))
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
