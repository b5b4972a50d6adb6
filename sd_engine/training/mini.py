"""The recipe of `nightshift-mini`: every stage, in order, each resumed from its checkpoint when there is one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from sd_engine.clip import ClipTextEncoder
from sd_engine.config import ClipConfig, TinyDecoderConfig, UNetConfig, VaeConfig
from sd_engine.folder_writer import write_tiny_decoder
from sd_engine.schedules import NoiseSchedule
from sd_engine.tokenizer import Tokenizer
from sd_engine.training import captions, unet_training
from sd_engine.training.export import export
from sd_engine.training.tiny_decoder_training import TinyDecoderRecipe, train_tiny_decoder
from sd_engine.training.unet_training import Latents, Trainee, UNetRecipe, encode_pictures, train_unet
from sd_engine.training.vae_training import VaeRecipe, train_vae
from sd_engine.unet import UNet
from sd_engine.vae import Vae

MAX_TOKENS: Final = 32
TEXT_WIDTH: Final = 128
VAE: Final = VaeConfig(channels=(24, 48, 96, 128), blocks_per_level=1, norm_groups=8)
UNET: Final = UNetConfig(
    channels=(64, 128, 160),
    attention=(False, True, False),  # at 12 x 12 it took a third of a step's time, and shapes do without
    heads=(4, 4, 4),
    blocks_per_level=1,
    context_width=TEXT_WIDTH,
    norm_groups=16,
    sample_size=12,
)
# A third of the VAE decoder's multiplications, without its norms and its attention.
TINY_DECODER: Final = TinyDecoderConfig(channels=24, blocks=(2, 2, 1, 1))
# Noisier at the end than Stable Diffusion's schedule: a 12 x 12 latent shows its mean colour through more noise than
# a 64 x 64 one, and a model that never saw pure noise would guess the background from the noise it starts with.
SCHEDULE: Final = NoiseSchedule(beta_end=0.03, prediction="v_prediction", spacing="trailing")


@dataclass(frozen=True, slots=True)
class MiniRecipe:
    """The lengths of all stages; `benchmarks/README.md` says how the shipped model's run differed."""

    vae: VaeRecipe = field(default_factory=VaeRecipe)
    text_steps: int = 500
    unet: UNetRecipe = field(default_factory=UNetRecipe)
    tiny_decoder: TinyDecoderRecipe = field(default_factory=TinyDecoderRecipe)


def text_config(vocab_size: int) -> ClipConfig:
    """The text encoder's configuration, for a tokenizer of this many ids."""
    return ClipConfig(
        vocab_size=vocab_size, width=TEXT_WIDTH, mlp_width=4 * TEXT_WIDTH, layers=2, heads=4, max_tokens=MAX_TOKENS
    )


Say = Callable[[str], None]


def train_mini(folder: Path, recipe: MiniRecipe, say: Say) -> Path:
    """Train everything below `folder` and return the finished diffusers folder, `folder/nightshift-mini`."""
    model_folder = folder / "nightshift-mini"
    vocab_size = captions.write_tokenizer(model_folder / "tokenizer", MAX_TOKENS)
    tokenizer = Tokenizer.from_folder(model_folder / "tokenizer", max_tokens=MAX_TOKENS)
    say("vae: learning to draw pictures back")
    vae = train_vae(VAE, recipe.vae, folder)
    text_encoder = _text_encoder(folder, recipe, tokenizer, vocab_size, say)
    sets = _latents(folder, recipe, vae, tokenizer, say)
    scale = 1 / float(torch.cat([latents.mean.flatten() for latents in sets]).std())
    say(f"unet: learning to denoise (latent scale {scale:.4f})")
    unet = UNet(UNET)
    unet_training.initialise(unet)
    trainee = Trainee(unet, text_encoder, SCHEDULE)
    train_unet(trainee, sets, scale, tokenizer.encode([""])[0], recipe.unet, folder)
    vae = _scaled(vae, scale)
    export(model_folder, trainee.unet, trainee.text_encoder, vae, SCHEDULE)
    say("tiny decoder: learning to draw as the VAE does")
    decoder = train_tiny_decoder(TINY_DECODER, vae, recipe.tiny_decoder, folder)
    write_tiny_decoder(model_folder / "tiny_decoder", decoder)
    return model_folder


def _text_encoder(folder: Path, recipe: MiniRecipe, tokenizer: Tokenizer, vocab_size: int, say: Say) -> ClipTextEncoder:
    torch.manual_seed(recipe.unet.seed)
    encoder, checkpoint = ClipTextEncoder(text_config(vocab_size)), folder / "text.pt"
    if checkpoint.exists():
        encoder.load_state_dict(torch.load(checkpoint, weights_only=True))
        return encoder
    right = captions.train_text_encoder(encoder, tokenizer, recipe.text_steps, recipe.unet.seed)
    say(f"text encoder: {right:.1%} of what the captions tell is understood")
    torch.save(encoder.state_dict(), checkpoint)
    return encoder


def _latents(folder: Path, recipe: MiniRecipe, vae: Vae, tokenizer: Tokenizer, say: Say) -> list[Latents]:
    checkpoint = folder / "latents.pt"
    if checkpoint.exists():
        return [Latents(*saved) for saved in torch.load(checkpoint, weights_only=True)]
    done = 0

    def count(pictures: int) -> None:
        nonlocal done
        done += pictures
        if done % 1600 == 0:
            say(f"latents: {done} of {recipe.unet.pictures} pictures encoded")

    sets = encode_pictures(vae, tokenizer, recipe.unet, count)
    torch.save([(s.mean, s.deviation, s.ids, s.share) for s in sets], checkpoint)
    return sets


def _scaled(vae: Vae, scale: float) -> Vae:
    """The same VAE with its latents scaled to unit deviation: known only when pictures have been encoded."""
    scaled = Vae(replace(vae.config, scaling_factor=scale))
    scaled.load_state_dict(vae.state_dict())
    return scaled
