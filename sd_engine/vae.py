"""The KL autoencoder (VAE) of Stable Diffusion: pictures to latents and back.

Legend of the shape suffixes: B batch, C channels, H height, W width, N positions (H*W).
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G; parameter
names follow the diffusers layout but for the renames in `keymaps.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.blocks import Attention, Downsample, ResBlock, Upsample
from sd_engine.config import VaeConfig
from sd_engine.layers import Conv2d, GroupNorm, laid_out

_EPS = 1e-6  # every GroupNorm of the VAE; PyTorch's default 1e-5 would give other pictures
_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0
# Positions that attend together. Without a fused kernel all their scores are held at once: at 2048 x 2048 pixels the
# whole matrix would be 17 GB in float32.
_QUERIES = 16384


# How the features of a picture become others: an encoder or decoder, or what does the same in tiles.
Way = Callable[[Tensor], Tensor]


class VaeAttention(nn.Module):
    """Single-head self-attention over all positions, with its norm and skip."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, eps=_EPS)
        self.attention = Attention(channels, heads=1, qkv_bias=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        h_BNC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        mixed_BNC = torch.cat([self.attention(part_BNC, h_BNC) for part_BNC in h_BNC.split(_QUERIES, dim=1)], dim=1)
        return x_BCHW + mixed_BNC.transpose(1, 2).unflatten(2, x_BCHW.shape[-2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the coarsest level."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels, groups=groups, eps=_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([VaeAttention(channels, groups)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x_BCHW)))


class Level(nn.Module):
    """The residual blocks of one resolution, then a change of resolution (none at the last level)."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, groups: int, resample: nn.Module | None):
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.resnets = nn.ModuleList(ResBlock(a, b, groups=groups, eps=_EPS) for a, b in pairwise(widths))
        self.resample = resample

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H', W']."""
        for resnet in self.resnets:
            x_BCHW = resnet(x_BCHW)
        return x_BCHW if self.resample is None else self.resample(x_BCHW)


class Encoder(nn.Module):
    """Pictures in [-1, 1] to the mean and log-variance of their latents."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        channels, groups = config.channels, config.norm_groups
        self.conv_in = Conv2d(config.image_channels, channels[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            resample = Downsample(width, pad_all_sides=False) if i < len(channels) - 1 else None
            self.levels.append(Level(channels[max(i - 1, 0)], width, config.blocks_per_level, groups, resample))
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 2 * latent channels, H / factor, W / factor]."""
        h_BCHW = self.conv_in(laid_out(x_BCHW))
        for level in self.levels:
            h_BCHW = level(h_BCHW)
        return self.head(h_BCHW)

    def head(self, h_BCHW: Tensor) -> Tensor:
        """What follows the levels, at latent resolution: [B, C, H, W] -> [B, 2 * latent channels, H, W]."""
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h_BCHW))))


class Decoder(nn.Module):
    """Latents to pictures in [-1, 1] (not clamped)."""

    def __init__(self, config: VaeConfig):
        super().__init__()
        channels, groups = config.channels[::-1], config.norm_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.levels = nn.ModuleList()
        for i, width in enumerate(channels):
            resample = Upsample(width) if i < len(channels) - 1 else None
            # One block more than on the way in, as in Stable Diffusion.
            self.levels.append(Level(channels[max(i - 1, 0)], width, config.blocks_per_level + 1, groups, resample))
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = Conv2d(channels[-1], config.image_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """[B, latent channels, H / factor, W / factor] -> [B, 3, H, W]."""
        h_BCHW = self.neck(z_BCHW)
        for level in self.levels:
            h_BCHW = level(h_BCHW)
        return self.conv_out(F.silu(self.conv_norm_out(h_BCHW)))

    def neck(self, z_BCHW: Tensor) -> Tensor:
        """What comes before the levels, at latent resolution: [B, latent channels, H, W] -> [B, C, H, W]."""
        return self.mid_block(self.conv_in(laid_out(z_BCHW)))


class Vae(nn.Module):
    """Encoder and decoder; latents leave and enter scaled, so that their deviation is about one.

    Where `through` is given, it stands for the encoder or decoder (in tiles: `vae_tiles`).
    """

    def __init__(self, config: VaeConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, x_BCHW: Tensor, through: Way | None = None) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] in [-1, 1] -> mean and standard deviation of the unscaled latents."""
        mean, logvar = self.quant_conv((through or self.encoder)(x_BCHW)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX))

    def encode(self, x_BCHW: Tensor, noise_BCHW: Tensor, through: Way | None = None) -> Tensor:
        """Pictures in [-1, 1] -> one sample of their scaled latents; the randomness is the caller's."""
        mean, deviation = self.moments(x_BCHW, through)
        return (mean + deviation * noise_BCHW) * self.config.scaling_factor

    def decode(self, z_BCHW: Tensor, through: Way | None = None) -> Tensor:
        """Scaled latents -> pictures, about [-1, 1] (not clamped)."""
        return (through or self.decoder)(self.post_quant_conv(z_BCHW / self.config.scaling_factor))
