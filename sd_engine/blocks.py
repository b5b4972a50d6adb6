"""The building blocks that the U-Net and the VAE share.

Legend of the shape suffixes: B batch, C channels, H height, W width, N positions (H*W), T text tokens,
D width of a token, E width of the time embedding, G attention heads, K width of a head, R rows of a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.attention import attend
from sd_engine.layers import Conv2d, Conv3x3, GroupNorm, Linear, Pointwise

KeysValues = tuple[Tensor, Tensor]


def timestep_embedding(t_B: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps, cosines first: [B] -> [B, width], float32.

    Source: Ho et al. 2020, after Vaswani et al. 2017, section 3.5, with the order of Stable Diffusion.
    """
    half = width // 2
    # In the reference's order of operations: an angle is up to 1000 times as wrong as its frequency is rounded.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a skip; with a time embedding in the U-Net, without in the VAE."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels_in, eps=eps)
        self.conv1 = Conv3x3(channels_in, channels_out)
        self.time_emb_proj = Linear(time_width, channels_out) if time_width else None
        self.norm2 = GroupNorm(groups, channels_out, eps=eps)
        self.conv2 = Conv3x3(channels_out, channels_out)
        self.conv_shortcut = Pointwise(channels_in, channels_out) if channels_in != channels_out else None

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor | None = None) -> Tensor:
        """[B, channels_in, H, W], and [B, E] if it was built with a time width -> [B, channels_out, H, W]."""
        shift_BC = None
        if self.time_emb_proj is not None:
            assert emb_BE is not None, "a block with a time embedding needs one"
            shift_BC = self.time_emb_proj(F.silu(emb_BE))
        # Where no gradient is wanted the activation takes the norm's own memory: new memory costs a CPU page faults.
        in_place = not torch.is_grad_enabled()
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW), inplace=in_place), shift_BC)
        return self.conv2(F.silu(self.norm2(h_BCHW), inplace=in_place)) + self.skip(x_BCHW)

    def skip(self, x_BCHW: Tensor) -> Tensor:
        """What goes around the convolutions, cell by cell: [B, channels_in, H, W] -> [B, channels_out, H, W]."""
        return x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW)


class Attention(nn.Module):
    """Multi-head attention from `x` to itself, to a context, or to keys and values made before."""

    def __init__(self, width: int, *, heads: int, context_width: int | None = None, qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=qkv_bias)
        self.to_k = Linear(context_width or width, width, bias=qkv_bias)
        self.to_v = Linear(context_width or width, width, bias=qkv_bias)
        self.to_out = Linear(width, width)

    def forward(self, x_BND: Tensor, context_BTD: Tensor | None = None) -> Tensor:
        """[B, N, D] (and [B, T, context_width]) -> [B, N, D]."""
        return self.attend(x_BND, [self.keys_values(x_BND if context_BTD is None else context_BTD)])

    def keys_values(self, source_BTD: Tensor) -> KeysValues:
        """[B, T, context_width] -> keys and values, [B, G, T, K] each."""
        return self._split(self.to_k(source_BTD)), self._split(self.to_v(source_BTD))

    def attend(self, x_BND: Tensor, runs: Sequence[KeysValues]) -> Tensor:
        """[B, N, D], and keys and values [R, G, T, K] of one run of rows after the other, B in all -> [B, N, D]."""
        queries_BGNK = self._split(self.to_q(x_BND))
        parts = queries_BGNK.split([len(keys) for keys, _ in runs])
        mixed = [attend(q, k, v).transpose(1, 2) for q, (k, v) in zip(parts, runs, strict=True)]
        mixed_BNGK = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return self.to_out(mixed_BNGK.flatten(2))

    def _split(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve both sides by a strided convolution.

    The VAE of Stable Diffusion pads right and below only, the U-Net all around: the other choice shifts every feature.
    """

    def __init__(self, channels: int, *, pad_all_sides: bool):
        super().__init__()
        self.pad_all_sides = pad_all_sides
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_sides else 0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, ceil(H / 2) or H // 2, likewise W]."""
        return self.conv(x_BCHW if self.pad_all_sides else F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides (nearest) and convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x_BCHW: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W], or to `size`, where the way down had rounded an odd side up."""
        height, width = x_BCHW.shape[2:]
        if size in (None, (2 * height, 2 * width)):
            return self.conv.doubled(x_BCHW)
        return self.conv(F.interpolate(x_BCHW, size=size, mode="nearest"))
