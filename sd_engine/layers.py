"""The building blocks that the U-Net and the VAE share.

Legend of the shape suffixes: B batch, C channels, H height, W width, N positions (H*W), T text tokens,
D width of a token, E width of the time embedding, G attention heads, K width of a head, R rows of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine import prepacking, winograd
from sd_engine.attention import attend
from sd_engine.prepacking import MadeOf

KeysValues = tuple[Tensor, Tensor]
_T = TypeVar("_T")

# Numbers of a weight that may lie in memory in another layout than in its file, at no cost that anybody would notice;
# and of one that may be wider there. In SD 1.5 the latter are a ninetieth of all weights, in small models nearly all.
_SMALL = 2**20
_SMALLEST = 2**18

# Of the four cells that a cell of a map becomes when its sides are doubled.
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def timestep_embedding(t_B: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps, cosines first: [B] -> [B, width], float32.

    Source: Ho et al. 2020, after Vaswani et al. 2017, section 3.5, with the order of Stable Diffusion.
    """
    half = width // 2
    # In the reference's order of operations: an angle is up to 1000 times as wrong as its frequency is rounded.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[:, None] * frequencies[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def laid_out(x_BCHW: Tensor) -> Tensor:
    """A feature map in the layout that its device computes fastest: channels last on CPUs.

    Every layer keeps it, and tokens are a view of it. Not on CUDA: there PyTorch's GroupNorm undoes it, layer by layer
    (its issue 111824).
    """
    return x_BCHW.contiguous(memory_format=torch.channels_last) if x_BCHW.device.type == "cpu" else x_BCHW


class Linear(nn.Linear):
    """A matrix product in the dtype of what comes in: weights may rest in a narrower one (`lay_out_weights`).

    sparing: keep nothing beside the weights.
    """

    def __init__(self, width_in: int, width_out: int, bias: bool = True):
        super().__init__(width_in, width_out, bias)
        self.sparing = False
        self._made = MadeOf()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width in] -> [..., width out]."""
        return self.at(x.dtype)(x)

    def at(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The product for several calls in a row, so that weights are widened once; without the hooks of a call."""
        return _product(self.weight, self.bias, dtype, None if self.sparing else self._made)


def _product(
    weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, kept: MadeOf | None
) -> Callable[[Tensor], Tensor]:
    """[..., I] -> [..., O] in that dtype. kept: where the prepacked weight is kept from call to call, if anywhere."""
    if not prepacking.serves(weight_OI.device, dtype):
        return partial(F.linear, weight=weight_OI.to(dtype), bias=bias_O)
    if kept is None:
        return partial(prepacking.linear, weight=weight_OI.to(dtype), bias_O=bias_O)
    prepacked = kept.get(weight_OI, dtype, lambda: prepacking.prepacked_linear(weight_OI.to(dtype)))
    return partial(prepacking.linear, weight=prepacked, bias_O=bias_O)


class Conv2d(nn.Conv2d):
    """A convolution in the dtype of what comes in: weights may rest in a narrower one (`lay_out_weights`).

    sparing: keep nothing beside the weights.
    """

    def __init__(
        self, channels_in: int, channels_out: int, side: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ):
        super().__init__(channels_in, channels_out, side, stride=stride, padding=padding, bias=bias)
        self.sparing = False
        self._made = MadeOf()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels in, H, W] -> [B, channels out, ...]."""
        weight, dtype = self.weight, x_BCHW.dtype
        if not prepacking.serves(x_BCHW.device, dtype):
            return self._conv_forward(x_BCHW, weight.to(dtype), self.bias)
        geometry = self.stride[0], int(self.padding[0])
        convolve = self._kept(dtype, lambda: prepacking.prepacked_convolution(weight.to(dtype), *geometry))
        return convolve(x_BCHW, self.bias)

    def _kept(self, what: Hashable, make: Callable[[], _T]) -> _T:
        return make() if self.sparing else self._made.get(self.weight, what, make)


class Conv3x3(Conv2d):
    """A 3 x 3 convolution with a rim of zeros; by Winograd's algorithm where that is faster, and equal up to rounding.

    The filters of that algorithm are made at the first call and kept beside the weights, at up to four times the memory
    that these take in float32. sparing: never make them.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor, shift_BC: Tensor | None = None) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H, W]; shift: added to every cell, [B, channels_out]."""
        form = None if self.sparing else winograd.form_for(self.weight, x_BCHW)
        if form is None:
            out_BCHW = super().forward(x_BCHW)
            return out_BCHW if shift_BC is None else out_BCHW + shift_BC[:, :, None, None]
        assert self.bias is not None
        bias = self.bias if shift_BC is None else self.bias + shift_BC
        filters = self._kept(form, lambda: winograd.Filters.of(self.weight, form))
        return winograd.convolve(x_BCHW, filters, bias)

    def doubled(self, x_BCHW: Tensor) -> Tensor:
        """Of the map enlarged to twice its sides (nearest): [B, channels_in, H, W] -> [B, channels_out, 2H, 2W].

        The cells of an enlarged map come in fours: each of the four places sees 2 x 2 cells of the small map, by sums
        of the weights, which are 16 multiplications instead of 36.
        """
        height, width = x_BCHW.shape[2:]
        if not prepacking.serves(x_BCHW.device, x_BCHW.dtype):
            return self(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        assert self.bias is not None
        convolve = self._kept(("doubled", x_BCHW.dtype), lambda: _four_places(self.weight, x_BCHW.dtype))
        places_BPOHW = convolve(x_BCHW, self.bias.repeat(4)).unflatten(1, (4, -1))
        out_BOHW = laid_out(x_BCHW.new_empty(len(x_BCHW), len(self.bias), 2 * height, 2 * width))
        for place, (y, x) in enumerate(_PLACES):
            out_BOHW[:, :, y::2, x::2] = places_BPOHW[:, place, :, y : y + height, x : x + width]
        return out_BOHW


def _four_places(weight_OC33: Tensor, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """The convolution of a map with a rim of zeros that gives all places of the enlarged one: [B, 4 * O, H+1, W+1]."""
    weights_OC22 = [_halved(_halved(weight_OC33.float(), 2, y), 3, x) for y, x in _PLACES]
    return prepacking.prepacked_convolution(torch.cat(weights_OC22).to(dtype), stride=1, padding=1)


def _halved(weight: Tensor, dim: int, place: int) -> Tensor:
    """Along one side, what the 3 taps of the enlarged map are on the small one: two of them meet in one cell."""
    before, middle, after = weight.split(1, dim)
    return torch.cat([before + middle, after] if place else [before, middle + after], dim)


def lay_out_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring small weights into the dtype that a CPU computes in, and plain convolutions' into the layout of their maps.

    Else each call does so anew, as it does for the large ones: these are nearly all of a model, loading would take
    longer, and they would no longer lie in the pages of its file. Winograd's algorithm stands for most of them.
    """
    for parameter in module.parameters():
        if parameter.ndim < 2 or parameter.numel() <= _SMALLEST:
            parameter.data = parameter.data.to(dtype)
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1) and layer.weight.numel() <= _SMALL:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def spare_memory(module: nn.Module, sparing: bool) -> None:
    """Whether the layers of a module do without what would make them fast at the cost of memory."""
    for layer in module.modules():
        if isinstance(layer, Linear | Conv2d):
            layer.sparing = sparing


class Pointwise(Conv2d):
    """A 1 x 1 convolution, as the matrix product that it is: in the channels-last layout nothing is copied for it."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H, W]."""
        kept = None if self.sparing else self._made
        product = _product(self.weight.flatten(1), self.bias, x_BCHW.dtype, kept)
        return product(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a skip; with a time embedding in the U-Net, without in the VAE."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, eps=eps)
        self.conv1 = Conv3x3(channels_in, channels_out)
        self.time_emb_proj = Linear(time_width, channels_out) if time_width else None
        self.norm2 = nn.GroupNorm(groups, channels_out, eps=eps)
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
        mixed = [attend(q, k, v) for q, (k, v) in zip(parts, runs, strict=True)]
        mixed_BGNK = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        return self.to_out(mixed_BGNK.transpose(1, 2).flatten(2))

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
