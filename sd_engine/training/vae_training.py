"""First stage: the autoencoder learns to draw our pictures back from latents of 1/8 the size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.blocks import ResBlock
from sd_engine.config import VaeConfig
from sd_engine.training.drawings import draw_scene_at_random, paint
from sd_engine.training.loop import Notes, start_convolutions, train
from sd_engine.vae import Vae


@dataclass(frozen=True, slots=True)
class VaeRecipe:
    """How the VAE is trained (see `loop.Plan`)."""

    steps: int = 2000
    batch: int = 8
    side: int = 64
    learning_rate: float = 1.5e-3
    warmup: int = 50
    kl_weight: float = 1e-4
    ema: float = 0.995
    seed: int = 1


def picture_batches(batch: int, side: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of drawings: float [batch, 3, side, side] in [-1, 1]."""
    rng = random.Random(seed)
    while True:
        # Half of the pictures hold two things: twice the edges to learn from.
        scenes = [draw_scene_at_random(rng, two_things=0.5) for _ in range(batch)]
        pixels = np.stack([paint(scene, side, side, rng) for scene in scenes])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 for flat colours, L1 of the pixel differences for sharp edges, a little L2 against outliers."""
    across = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    return F.l1_loss(y, x) + 0.5 * across + 0.5 * F.mse_loss(y, x)


def initialise(vae: Vae) -> None:
    """Start every residual block as the identity and every latent almost without noise.

    With PyTorch's own start the picture hardly reaches the latents: 60 steps gave 13 dB, with this one 17 dB.
    """
    start_convolutions(vae)
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
    half = vae.config.latent_channels
    with torch.no_grad():
        vae.quant_conv.weight[half:].mul_(0.1)
        vae.quant_conv.bias[half:].fill_(-5.0)  # type: ignore[index]


def train_vae(config: VaeConfig, recipe: VaeRecipe, folder: Path) -> Vae:
    """Train (or resume from `folder/vae.pt`) and return the averaged model. Appends to `folder/vae.log.jsonl`."""
    torch.manual_seed(recipe.seed)
    vae = Vae(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialise(vae)

    def loss_of(x_BCHW: Tensor) -> tuple[Tensor, Notes]:
        mean, deviation = vae.moments(x_BCHW.contiguous(memory_format=torch.channels_last))
        y_BCHW = vae.decoder(vae.post_quant_conv(mean + deviation * torch.randn_like(mean)))
        kl = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
        loss = reconstruction_loss(x_BCHW, y_BCHW) + recipe.kl_weight * kl
        psnr = -10 * torch.log10(F.mse_loss(y_BCHW.clamp(-1, 1), x_BCHW) / 4)
        return loss, {"psnr": psnr.detach(), "kl": kl.detach(), "std": mean.std().detach()}

    train(
        "vae", vae, {vae: 1.0}, lambda seed: picture_batches(recipe.batch, recipe.side, seed), loss_of, recipe, folder
    )
    return vae
