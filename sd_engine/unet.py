"""The U-Net of Stable Diffusion: a noisy latent, a timestep and a text to a prediction of the noise (or velocity).

Legend of the shape suffixes: U U-Net rows (a guided image has two), C channels, H height, W width (latent cells),
N positions (H*W), T text tokens, D width of a token, E width of the time embedding.
Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; parameter names follow
the diffusers layout but for the renames in `keymaps.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.blocks import Attention, Downsample, ResBlock, Upsample, timestep_embedding
from sd_engine.config import UNetConfig
from sd_engine.context import Context, PackContext
from sd_engine.layers import Conv2d, GatedLinear, GroupNorm, Linear, Pointwise, laid_out
from sd_engine.merging import Merging

Texts = Tensor | PackContext

_RESNET_EPS = 1e-5
# Of a feed-forward on a CPU: between its layers a token is eight times as wide, and memory that the allocator asks the
# system for at each call costs page faults, a quarter of the layers' time at 64 x 64 positions.
_TOKENS_AT_ONCE = 1024
_TRANSFORMER_EPS = 1e-6  # the spatial transformers differ from the residual blocks, as in the reference


class GeGlu(nn.Module):
    """Feed-forward with a gated GELU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, width: int, expansion: int = 4):
        super().__init__()
        self.proj_in = GatedLinear(width, expansion * width)
        self.proj_out = Linear(expansion * width, width)

    def forward(self, x_UND: Tensor) -> Tensor:
        """[U, N, D] -> [U, N, D]."""
        if x_UND.device.type != "cpu" or x_UND.shape[1] < _TOKENS_AT_ONCE or torch.is_grad_enabled():
            return self.proj_out(self.proj_in(x_UND))
        into, out = self.proj_in.at(x_UND.dtype), self.proj_out.at(x_UND.dtype)
        # A row by itself: which of its tokens go together must not depend on its neighbours.
        parts = [out(into(part_ND)) for x_ND in x_UND for part_ND in x_ND.split(_TOKENS_AT_ONCE)]
        return torch.cat(parts).view_as(x_UND)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after its LayerNorm and around a skip.

    index: its place among the blocks of the U-Net.
    """

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.index = 0
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads=heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads=heads, context_width=context_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = GeGlu(width)

    def forward(self, x_UND: Tensor, context: Texts, merging: Merging | None = None) -> Tensor:
        """[U, N, D], the texts of its rows -> [U, N, D]."""
        h_UND = self.norm1(x_UND)
        x_UND = x_UND + (self.attn1(h_UND) if merging is None else merging.around(self.attn1, h_UND))
        texts = context.layer(self.index) if isinstance(context, PackContext) else [self.attn2.keys_values(context)]
        x_UND = x_UND + self.attn2.attend(self.norm2(x_UND), texts)
        return x_UND + self.ff(self.norm3(x_UND))


class SpatialTransformer(nn.Module):
    """A transformer block over the positions of a feature map."""

    def __init__(self, channels: int, heads: int, config: UNetConfig):
        super().__init__()
        self.linear = config.linear_projection
        self.norm = GroupNorm(config.norm_groups, channels, eps=_TRANSFORMER_EPS)
        self.proj_in = Linear(channels, channels) if self.linear else Pointwise(channels, channels)
        self.block = TransformerBlock(channels, heads, config.context_width)
        self.proj_out = Linear(channels, channels) if self.linear else Pointwise(channels, channels)

    def forward(self, x_UCHW: Tensor, context: Texts) -> Tensor:
        """[U, C, H, W], the texts of its rows -> [U, C, H, W]."""
        size, skip_UCHW = x_UCHW.shape[-2:], x_UCHW
        h = self.norm(x_UCHW)
        h_UNC = self.proj_in(_to_tokens(h)) if self.linear else _to_tokens(self.proj_in(h))
        h_UNC = self.block(h_UNC, context, context.merging_at(size) if isinstance(context, PackContext) else None)
        h = _to_map(self.proj_out(h_UNC), size) if self.linear else self.proj_out(_to_map(h_UNC, size))
        return h + skip_UCHW


def _to_tokens(x_UCHW: Tensor) -> Tensor:
    return x_UCHW.flatten(2).transpose(1, 2)


def _to_map(x_UNC: Tensor, size: torch.Size) -> Tensor:
    return x_UNC.transpose(1, 2).unflatten(2, size)


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each with its spatial transformer where the level has them."""

    def __init__(self, widths: list[tuple[int, int]], heads: int | None, config: UNetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(a, b, groups=config.norm_groups, eps=_RESNET_EPS, time_width=4 * config.channels[0])
            for a, b in widths
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(b, heads, config) if heads else nn.Identity() for _, b in widths
        )

    def block(self, i: int, x_UCHW: Tensor, emb_UE: Tensor, context: Texts) -> Tensor:
        """Run residual block `i` and what attends after it."""
        x_UCHW = self.resnets[i](x_UCHW, emb_UE)
        attention = self.attentions[i]
        return attention(x_UCHW, context) if isinstance(attention, SpatialTransformer) else x_UCHW


class DownLevel(Level):
    """A level on the way down; every block's output, and the halved one, is kept for the way up."""

    def __init__(self, level: int, config: UNetConfig):
        channels = config.channels
        before = channels[max(level - 1, 0)]
        widths = [(before, channels[level])] + [(channels[level],) * 2] * (config.blocks_per_level - 1)
        super().__init__(widths, config.heads[level] if config.attention[level] else None, config)
        last = level == len(channels) - 1
        self.downsample = None if last else Downsample(channels[level], pad_all_sides=True)

    def forward(self, x_UCHW: Tensor, emb_UE: Tensor, context: Texts, skips: list[Tensor]) -> Tensor:
        """Push each output on `skips`; return the last."""
        for i in range(len(self.resnets)):
            x_UCHW = self.block(i, x_UCHW, emb_UE, context)
            skips.append(x_UCHW)
        if self.downsample is not None:
            x_UCHW = self.downsample(x_UCHW)
            skips.append(x_UCHW)
        return x_UCHW


class MidBlock(Level):
    """Residual block, spatial transformer, residual block, at the coarsest level."""

    def __init__(self, config: UNetConfig):
        width = config.channels[-1]
        super().__init__([(width, width)] * 2, None, config)
        self.attentions = nn.ModuleList([SpatialTransformer(width, config.heads[-1], config), nn.Identity()])

    def forward(self, x_UCHW: Tensor, emb_UE: Tensor, context: Texts) -> Tensor:
        """[U, C, H, W] -> [U, C, H, W]."""
        return self.block(1, self.block(0, x_UCHW, emb_UE, context), emb_UE, context)


class UpLevel(Level):
    """A level on the way up; every block takes one kept output beside its input."""

    def __init__(self, level: int, config: UNetConfig):
        channels = config.channels
        width, below = channels[level], channels[min(level + 1, len(channels) - 1)]
        blocks = config.blocks_per_level + 1
        # The last kept output of a level comes from the level above it (its halved output, or conv_in's).
        skips = [width] * (blocks - 1) + [channels[max(level - 1, 0)]]
        widths = [((below if i == 0 else width) + skip, width) for i, skip in enumerate(skips)]
        super().__init__(widths, config.heads[level] if config.attention[level] else None, config)
        self.upsample = Upsample(width) if level > 0 else None

    def forward(
        self, x_UCHW: Tensor, emb_UE: Tensor, context: Texts, skips: list[Tensor], blocks: int | None = None
    ) -> Tensor:
        """Pop one of `skips` per block; enlarge to the size of the next one, which the way down may have rounded.

        blocks: only the first so many, of a level that enlarges nothing.
        """
        for i in range(len(self.resnets))[:blocks]:
            x_UCHW = self.block(i, torch.cat([x_UCHW, skips.pop()], dim=1), emb_UE, context)
        if self.upsample is not None:
            height, width = skips[-1].shape[-2:]
            x_UCHW = self.upsample(x_UCHW, (height, width))
        return x_UCHW


class TimeEmbedding(nn.Module):
    """Two linear layers over the sinusoids of the timestep."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.linear_1 = Linear(width, 4 * width)
        self.linear_2 = Linear(4 * width, 4 * width)

    def forward(self, t_U: Tensor, dtype: torch.dtype) -> Tensor:
        """[U] -> [U, E] in that dtype, with E four times the width of the first level."""
        sinusoids = timestep_embedding(t_U, self.width).to(dtype)
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class UNet(nn.Module):
    """Predict noise or velocity; every row has its own timestep and its own text."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        levels = range(len(config.channels))
        self.conv_in = Conv2d(config.in_channels, config.channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(config.channels[0])
        self.down_blocks = nn.ModuleList(DownLevel(level, config) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpLevel(level, config) for level in reversed(levels))
        self.conv_norm_out = GroupNorm(config.norm_groups, config.channels[0], eps=_RESNET_EPS)
        self.conv_out = Conv2d(config.channels[0], config.out_channels, 3, padding=1)
        for i, block in enumerate(self.blocks):
            block.index = i

    @property
    def blocks(self) -> list[TransformerBlock]:
        """Those that attend to the text, in a fixed order."""
        return [module for module in self.modules() if isinstance(module, TransformerBlock)]

    def merging(self, ratio: float, height: int, width: int) -> Merging | None:
        """Of this ratio, for latents of this size: at the finest level that attends. None where nothing is merged."""
        if ratio == 0.0 or not any(self.config.attention):
            return None
        for _ in range(self.config.attention.index(True)):
            height, width = (height + 1) // 2, (width + 1) // 2
        return Merging(ratio, height, width)

    def context(self, text_TD: Tensor) -> Context:
        """What all cross-attention layers make of one encoded prompt [T, context width]: the same at every step."""
        made = (block.attn2.keys_values(text_TD[None]) for block in self.blocks)
        return Context(tuple(torch.cat(keys_values) for keys_values in made))

    def forward(self, x_UCHW: Tensor, t_U: Tensor, context: Texts) -> Tensor:
        """Latents [U, in, H, W], timesteps [U], texts of the rows -> prediction [U, out, H, W].

        The texts are encoded prompts [U, T, context width], or the joined contexts of the rows.
        """
        return self.parted(x_UCHW, t_U, context)[0]

    def parted(
        self, x_UCHW: Tensor, t_U: Tensor, context: Texts, deep_UCHW: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The prediction of `forward`, and what goes into the last block of the way up: the deep features.

        deep_UCHW: those of an earlier step. Then nothing before that block but `conv_in` is computed: the shallowest
        of the branches of DeepCache (Ma et al. 2023, arXiv 2312.00858).
        """
        emb_UE, x_UCHW = self.time_embedding(t_U, x_UCHW.dtype), self.conv_in(laid_out(x_UCHW))
        if deep_UCHW is None:
            deep_UCHW = self._deep(x_UCHW, emb_UE, context)
        last = self.up_blocks[-1]
        assert isinstance(last, UpLevel)
        x_UCHW = last.block(-1, torch.cat([deep_UCHW, x_UCHW], dim=1), emb_UE, context)
        return self.conv_out(F.silu(self.conv_norm_out(x_UCHW))), deep_UCHW

    def _deep(self, x_UCHW: Tensor, emb_UE: Tensor, context: Texts) -> Tensor:
        skips = [x_UCHW]
        for down in self.down_blocks:
            x_UCHW = down(x_UCHW, emb_UE, context, skips)
        x_UCHW = self.mid_block(x_UCHW, emb_UE, context)
        *lower, last = self.up_blocks
        for up in lower:
            x_UCHW = up(x_UCHW, emb_UE, context, skips)
        return last(x_UCHW, emb_UE, context, skips, blocks=-1)
