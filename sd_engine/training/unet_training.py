"""Third stage: the U-Net learns to denoise the latents of our pictures, told by their captions."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.blocks import Attention, ResBlock
from sd_engine.clip import ClipTextEncoder
from sd_engine.schedules import NoiseSchedule
from sd_engine.tokenizer import Tokenizer
from sd_engine.training.drawings import draw_scene_at_random, paint
from sd_engine.training.loop import Notes, start_convolutions, train
from sd_engine.unet import SpatialTransformer, UNet
from sd_engine.vae import Vae


@dataclass(frozen=True, slots=True)
class UNetRecipe:
    """How the U-Net is trained. `sizes`: (height, width, share of the batches) in pixels."""

    steps: int = 5000
    batch: int = 32
    learning_rate: float = 1e-3
    text_share: float = 0.2
    warmup: int = 200
    drop_caption: float = 0.1
    ema: float = 0.999
    pictures: int = 9600
    sizes: tuple[tuple[int, int, float], ...] = ((96, 96, 0.8), (96, 128, 0.1), (128, 96, 0.1))
    two_things: float = 0.12
    seed: int = 2


@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """Encoded pictures of one size: mean and deviation [n, C, h, w] (unscaled), their captions' ids [n, T]."""

    mean: Tensor
    deviation: Tensor
    ids: Tensor
    share: float


@torch.no_grad()
def encode_pictures(
    vae: Vae, tokenizer: Tokenizer, recipe: UNetRecipe, progress: Callable[[int], None]
) -> list[Latents]:
    """Draw and encode the whole training set, once, and not again at each step."""
    rng = random.Random(recipe.seed)
    return [_encode_size(vae, tokenizer, recipe, rng, size, progress) for size in recipe.sizes]


def _encode_size(
    vae: Vae,
    tokenizer: Tokenizer,
    recipe: UNetRecipe,
    rng: random.Random,
    size: tuple[int, int, float],
    progress: Callable[[int], None],
    chunk: int = 16,
) -> Latents:
    height, width, share = size
    means, deviations, captions = [], [], []
    for _ in range(round(recipe.pictures * share / chunk)):
        scenes = [draw_scene_at_random(rng, recipe.two_things) for _ in range(chunk)]
        pixels = np.stack([paint(scene, width, height, rng) for scene in scenes])
        x_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean, deviation = vae.moments(x_BCHW.contiguous(memory_format=torch.channels_last))
        means.append(mean)
        deviations.append(deviation)
        captions += [scene.caption for scene in scenes]
        progress(chunk)
    return Latents(torch.cat(means).contiguous(), torch.cat(deviations).contiguous(), tokenizer.encode(captions), share)


def initialise(unet: UNet) -> None:
    """Start every residual branch at zero and the output at zero, so that the first steps are not spent on noise."""
    start_convolutions(unet)
    for module in unet.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, SpatialTransformer):
            nn.init.zeros_(module.proj_out.weight)
        elif isinstance(module, Attention):
            nn.init.xavier_uniform_(module.to_q.weight)
            nn.init.xavier_uniform_(module.to_k.weight)
    nn.init.zeros_(unet.conv_out.weight)


class Trainee(nn.Module):
    """U-Net and text encoder, trained together: one loss, one optimizer, one average."""

    def __init__(self, unet: UNet, text_encoder: ClipTextEncoder, schedule: NoiseSchedule):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.schedule = schedule
        alphas = torch.from_numpy(np.asarray(schedule.alphas_cumprod, dtype=np.float32))
        self.register_buffer("alphas", alphas, persistent=False)

    def loss(self, z_BCHW: Tensor, ids_BT: Tensor, t_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """Mean squared error of the predicted velocity (Salimans and Ho 2022, "Progressive Distillation", app. D)."""
        alpha = self.alphas[t_B][:, None, None, None]  # type: ignore[index]
        x_BCHW = alpha.sqrt() * z_BCHW + (1 - alpha).sqrt() * noise_BCHW
        velocity_BCHW = alpha.sqrt() * noise_BCHW - (1 - alpha).sqrt() * z_BCHW
        return F.mse_loss(self.unet(x_BCHW, t_B, self.text_encoder(ids_BT)), velocity_BCHW)


def batches(
    sets: list[Latents], scale: float, recipe: UNetRecipe, empty: Tensor, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (scaled latents, caption ids) batches, each of one size; some captions are dropped for guidance."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([latents.share for latents in sets])
    while True:
        chosen = sets[int(torch.multinomial(shares, 1, generator=generator))]
        pick = torch.randint(len(chosen.mean), (recipe.batch,), generator=generator)
        noise = torch.randn(chosen.mean[pick].shape, generator=generator)
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.drop_caption
        ids = torch.where(dropped[:, None], empty, chosen.ids[pick])
        yield (chosen.mean[pick] + chosen.deviation[pick] * noise) * scale, ids


def timesteps(count: int, train_steps: int) -> Tensor:
    """Timesteps to learn from: every second one uniform, the others mostly where shapes are decided.

    The others are logit-normal (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1) around 0.4:
    above 0.7 only colours are left to tell, below 0.1 only edges, and half of the steps would go there.
    """
    uniform, focused = torch.rand(count), torch.sigmoid(0.8 * torch.randn(count) - 0.4)
    share = torch.where(torch.arange(count) % 2 == 0, uniform, focused)
    return (share * train_steps).long().clamp(max=train_steps - 1)


def train_unet(
    trainee: Trainee, sets: list[Latents], scale: float, empty: Tensor, recipe: UNetRecipe, folder: Path
) -> None:
    """Train (or resume from `folder/unet.pt`), and leave the averaged weights. Appends to `folder/unet.log.jsonl`."""

    def loss_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Notes]:
        z_BCHW, ids_BT = batch
        t_B = timesteps(len(z_BCHW), trainee.schedule.train_steps)
        return trainee.loss(z_BCHW, ids_BT, t_B, torch.randn_like(z_BCHW)), {}

    shares = {trainee.unet: 1.0, trainee.text_encoder: recipe.text_share}
    train("unet", trainee, shares, lambda seed: batches(sets, scale, recipe, empty, seed), loss_of, recipe, folder)
