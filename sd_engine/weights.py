"""Weights: a checkpoint in any of its layouts to a model that is ready to draw.

Modules are built on `meta` (no memory, no initialization), files are mapped into memory, and the mapped tensors are
assigned, or converted one by one: so loading costs one read, needs no memory twice, and CPU processes that load the
same file in its own dtype share its pages. Loading is strict: a key that is missing, unexpected or of another shape is
an error that lists the keys, and so is a number that is not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from sd_engine.checkpoint import Checkpoint, Choice, opened_checkpoint, read_config
from sd_engine.clip import ClipTextEncoder
from sd_engine.config import TinyDecoderConfig, VaeConfig
from sd_engine.errors import WeightsError
from sd_engine.filling import Part, Uninitialized, fill
from sd_engine.finite import looked_at
from sd_engine.keymaps import TINY_DECODER
from sd_engine.layers import lay_out_weights, spare_memory
from sd_engine.layouts import component_file, opened
from sd_engine.model import Configs, Model
from sd_engine.offload import Place, pin
from sd_engine.prompts.embeddings import load_embeddings
from sd_engine.tiny_decoder import TinyDecoder
from sd_engine.tokenizer import Tokenizer
from sd_engine.unet import UNet
from sd_engine.vae import Vae

#: Where a model keeps its tiny decoder: in its folder, or beside its single file.
TINY_DECODER_FOLDER: Final = "tiny_decoder"


def load_model(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    *,
    tokenizer: Path | str | None = None,
    configs: Configs | None = None,
    offload: str = "resident",
    variant: str | None = None,
    ema: bool = False,
    vae: Path | str | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
    embeddings: Path | str | None = None,
    tiny_decoder: Path | str | None = None,
) -> Model:
    """Load a diffusers folder, a single file with the original (LDM) names, or a folder of bare component files.

    tokenizer: a folder with `vocab.json` and `merges.txt`; none given: `tokenizer/` in the folder or beside the file.
    configs: of what has no configurations; none given: SD 1.x or 2.x, inpainting or not, as the shapes tell.
    variant: the files of a folder that have this word in their names ("fp16"). ema: the averaged U-Net of a single
    file. vae: another VAE: a folder, a component file, or an original file, also a whole model's.
    prediction: "epsilon", "v_prediction" or "sample"; none given: the folder's, or the rule of `families.py`.
    zero_snr: whether the noise schedule ends in pure noise; none given: what the model says.
    embeddings: a folder of textual inversion files; none given: `embeddings/` in the model's folder or beside it.
    tiny_decoder: a folder with diffusers' AutoencoderTiny (TAESD), or with it as `tiny_decoder/`; none given:
    `tiny_decoder/` in the model's folder or beside the single file, if it is there.
    Raises InvalidDevice for a device, dtype or mode of offload that does not exist or is not here, and WeightsError:
    what is missing, unreadable, unsupported or does not fit, in which file, and what to do.
    """
    place = Place.pick(device, dtype, offload)
    choice = Choice(variant, ema, None if vae is None else Path(vae), configs, prediction, zero_snr)
    with opened_checkpoint(Path(path), choice) as checkpoint:
        words = _embeddings(checkpoint, embeddings)
        decoder = own_tiny_decoder(checkpoint, tiny_decoder, place)
        return filled_model(checkpoint, tokenizer_folder(checkpoint, tokenizer), place, words, decoder)


def own_tiny_decoder(checkpoint: Checkpoint, given: Path | str | None, place: Place) -> TinyDecoder | None:
    """Of the folder that was given, which must be there; else of the model's own; else none.

    Raises WeightsError as `load_tiny_decoder` does.
    """
    home = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    folder = home if given is None else Path(given)
    inside = folder / TINY_DECODER_FOLDER
    if given is None and not inside.is_dir():
        return None
    return load_tiny_decoder(inside if inside.is_dir() else folder, checkpoint.configs.vae, place)


def load_tiny_decoder(folder: Path, vae: VaeConfig, place: Place) -> TinyDecoder:
    """The decoder of an AutoencoderTiny's folder, on the device; its encoder is left alone.

    Raises WeightsError for one that is not whole, or not for latents of this VAE.
    """
    config = read_config(folder / "config.json", TinyDecoderConfig.from_dict)
    _check_latents(folder, config, vae)
    with torch.device("meta"), Uninitialized():
        decoder = TinyDecoder(config)
    with opened(component_file(folder, "tiny_decoder")) as file:
        part = Part("tiny_decoder", file, {key: key for key in file.keys}, TINY_DECODER, "diffusers")
        with looked_at([(file, part.wanted)], place.dtype):
            fill(decoder, part, place.device, place.dtype)
            _make_ready(decoder, place)
    return decoder


def _check_latents(folder: Path, config: TinyDecoderConfig, vae: VaeConfig) -> None:
    ours, theirs = (config.latent_channels, config.factor), (vae.latent_channels, vae.factor)
    if ours != theirs:
        raise WeightsError(
            f"{folder} decodes latents of {ours[0]} channels (latent_channels) at 1/{ours[1]} of the size "
            f"(num_decoder_blocks), the model's have {theirs[0]} at 1/{theirs[1]}; take the tiny decoder of its "
            "family, or remove that folder"
        )


def _embeddings(checkpoint: Checkpoint, given: Path | str | None) -> Mapping[str, Tensor]:
    """Of the folder that was given, which must be there; else of the first that is there; else none."""
    path = checkpoint.path
    usual = (folder / "embeddings" for folder in (path, path.parent) if (folder / "embeddings").is_dir())
    folder = next(usual, None) if given is None else Path(given)
    return {} if folder is None else load_embeddings(folder, checkpoint.configs.text.width)


def filled_model(
    checkpoint: Checkpoint,
    tokenizer: Path,
    place: Place,
    embeddings: Mapping[str, Tensor] | None = None,
    tiny_decoder: TinyDecoder | None = None,
) -> Model:
    """The model of an open checkpoint, ready to draw. Raises WeightsError for what does not fit."""
    with looked_at([(part.file, part.wanted) for part in checkpoint.parts], place.dtype):
        model = _empty_model(checkpoint, tokenizer, place, embeddings or {}, tiny_decoder)
        for part in checkpoint.parts:
            fill(model.modules[part.component], part, *place.at_rest(part.component))
        for module in model.modules.values():
            _make_ready(module, place)
    pin(model.modules, model.device, model.offload)
    return model


def _make_ready(module: nn.Module, place: Place) -> None:
    """Freeze a filled module; on a CPU its small weights become what it computes with."""
    module.eval().requires_grad_(False)
    spare_memory(module, place.offload != "resident")
    if place.device.type == "cpu":
        lay_out_weights(module, place.works_in)


def _empty_model(
    checkpoint: Checkpoint,
    tokenizer: Path,
    place: Place,
    embeddings: Mapping[str, Tensor],
    tiny_decoder: TinyDecoder | None,
) -> Model:
    """The model with its modules on `meta`."""
    configs = checkpoint.configs
    words = Tokenizer.from_folder(tokenizer, max_tokens=configs.text.max_tokens)
    if words.vocab_size > configs.text.vocab_size:
        raise WeightsError(
            f"the tokenizer in {tokenizer} has {words.vocab_size} tokens, the text encoder only "
            f"{configs.text.vocab_size}; use the tokenizer that the model was trained with"
        )
    with torch.device("meta"), Uninitialized():
        text_encoder, unet, vae = ClipTextEncoder(configs.text), UNet(configs.unet), Vae(configs.vae)
    return Model(
        checkpoint.name, words, text_encoder, unet, vae, configs.schedule, place.device, place.works_in, place.offload,
        embeddings, tiny_decoder,
    )  # fmt: skip


def tokenizer_folder(checkpoint: Checkpoint, given: Path | str | None) -> Path:
    """The folder of the tokenizer: what was given, or the checkpoint's own. Raises WeightsError if there is none."""
    folder = checkpoint.tokenizer if given is None else Path(given)
    if folder.is_dir():
        return folder
    if checkpoint.layout == "single file":
        raise WeightsError(
            f"{checkpoint.path} is a single file, which has no tokenizer, and {folder} is not a folder; pass "
            "tokenizer=FOLDER with vocab.json and merges.txt, or put them in tokenizer/ beside the file"
        )
    raise WeightsError(
        f"{checkpoint.path}: the tokenizer folder {folder} is not there; copy it from the model's source"
    )
