"""Last stage: a tiny decoder learns to make of a latent what the VAE's decoder makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_engine.config import TinyDecoderConfig
from sd_engine.tiny_decoder import TinyBlock, TinyDecoder
from sd_engine.training.loop import Notes, start_convolutions, train
from sd_engine.training.vae_training import picture_batches, reconstruction_loss
from sd_engine.vae import Vae

# What the U-Net ends with is never quite a latent of a drawing, and a decoder that saw nothing else takes each colour
# for the nearest one of the drawings. So they are noised (in deviations of a latent), mixed with one another, and made
# paler or stronger, each by a share of so much.
_NOISE, _MIX, _CONTRAST = 0.6, 0.5, 0.3


@dataclass(frozen=True, slots=True)
class TinyDecoderRecipe:
    """How the tiny decoder is trained (see `loop.Plan`)."""

    steps: int = 1500
    batch: int = 8
    side: int = 64
    learning_rate: float = 2e-3
    warmup: int = 50
    ema: float = 0.995
    seed: int = 4


def train_tiny_decoder(config: TinyDecoderConfig, vae: Vae, recipe: TinyDecoderRecipe, folder: Path) -> TinyDecoder:
    """Train (or resume from `folder/tiny_decoder.pt`) and return the averaged model, for the scaled latents of `vae`.

    Appends to `folder/tiny_decoder.log.jsonl`.
    """
    torch.manual_seed(recipe.seed)
    decoder = TinyDecoder(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start_convolutions(decoder)
    for module in decoder.modules():
        if isinstance(module, TinyBlock):  # each begins as the identity
            torch.nn.init.zeros_(module.conv[4].weight)  # type: ignore[arg-type] # a Sequential has no types

    def loss_of(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Notes]:
        z_BCHW, x_BCHW = pair
        y_BCHW = decoder(z_BCHW)
        psnr = -10 * torch.log10(F.mse_loss(y_BCHW.clamp(-1, 1), x_BCHW) / 4)
        return reconstruction_loss(x_BCHW, y_BCHW), {"psnr": psnr.detach()}

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (_pair(vae, x_BCHW) for x_BCHW in picture_batches(recipe.batch, recipe.side, seed))

    train("tiny_decoder", decoder, {decoder: 1.0}, batches, loss_of, recipe, folder)
    return decoder


@torch.no_grad()
def _pair(vae: Vae, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Latents of pictures, and what the VAE makes of them."""
    mean_BCHW, deviation_BCHW = vae.moments(x_BCHW)
    z_BCHW = (mean_BCHW + deviation_BCHW * torch.randn_like(mean_BCHW)) * vae.config.scaling_factor
    much_3B111 = torch.rand(3, len(x_BCHW), 1, 1, 1)
    z_BCHW = torch.lerp(z_BCHW, z_BCHW.roll(1, 0), _MIX * much_3B111[0])
    z_BCHW = z_BCHW * (1 + _CONTRAST * (2 * much_3B111[1] - 1)) + _NOISE * much_3B111[2] * torch.randn_like(z_BCHW)
    return z_BCHW, vae.decode(z_BCHW).clamp(-1, 1)
