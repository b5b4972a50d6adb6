"""A small decoder in the place of the VAE's: nearly its picture, in a fraction of the time (TAESD).

Legend of the shape suffixes: B batch, C channels, H height, W width.
Source: Ollin Boer Bohan's TAESD (github.com/madebyollin/taesd); the parameters' names are those of diffusers'
AutoencoderTiny.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.config import TinyDecoderConfig
from sd_engine.layers import Conv2d, laid_out

# Latents beyond are pressed together softly: far outliers would leave spots.
_MAGNITUDE: Final = 3.0


class TinyBlock(nn.Module):
    """Three convolutions around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        convs = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return F.relu(self.conv(x_BCHW) + x_BCHW)


class TinyDecoder(nn.Module):
    """Scaled latents, as the U-Net has them, to pictures in about [-1, 1] (not clamped). No norm, no attention."""

    def __init__(self, config: TinyDecoderConfig):
        super().__init__()
        self.config, channels = config, config.channels
        layers: list[nn.Module] = [Conv2d(config.latent_channels, channels, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.blocks):
            layers += [TinyBlock(channels) for _ in range(blocks)]
            if level < len(config.blocks) - 1:
                layers += [nn.Upsample(scale_factor=2), Conv2d(channels, channels, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, Conv2d(channels, 3, 3, padding=1))

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """[B, latent channels, H / factor, W / factor] -> [B, 3, H, W]."""
        pressed_BCHW = torch.tanh(laid_out(z_BCHW) / _MAGNITUDE) * _MAGNITUDE
        return self.layers(pressed_BCHW) * 2 - 1
