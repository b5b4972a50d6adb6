"""The layers that hold weights: products, convolutions and norms, each by what its device computes fastest.

Legend of the shape suffixes: B batch, C channels in, O out, H height, W width, P places of a doubled cell, I width in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine import prepacking, winograd
from sd_engine.prepacking import MadeOf

# Numbers of a weight that may lie in memory in another layout than in its file, at no cost that anybody would notice;
# and of one that may be wider there. In SD 1.5 the latter are a ninetieth of all weights, in small models nearly all.
_SMALL = 2**20
_SMALLEST = 2**18

# Below so many cells PyTorch's norm goes another way over maps in the channels-last layout, which takes 1.7 to 5.5
# times as long in bfloat16 as in float32 with the two conversions (measured on Zen 5 alone).
_CELLS_OF_SLOW_NORMS = 1024

# Of the four cells that a cell of a map becomes when its sides are doubled.
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def laid_out(x_BCHW: Tensor) -> Tensor:
    """A feature map in the layout that its device computes fastest: channels last on CPUs.

    Every layer keeps it, and tokens are a view of it. Not on CUDA: there PyTorch's GroupNorm undoes it, layer by layer
    (its issue 111824).
    """
    return x_BCHW.contiguous(memory_format=torch.channels_last) if x_BCHW.device.type == "cpu" else x_BCHW


class Linear(nn.Linear):
    """A matrix product in the dtype of what comes in: weights may rest in a narrower one (`lay_out_weights`)."""

    def __init__(self, width_in: int, width_out: int, bias: bool = True):
        super().__init__(width_in, width_out, bias)
        self.made = MadeOf()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width in] -> [..., width out]."""
        return self.at(x.dtype)(x)

    def at(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The product for several calls in a row, so that weights are widened once; without the hooks of a call."""
        return _product(self.weight, self.bias, dtype, self.made)


def _product(weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype, made: MadeOf) -> Callable[[Tensor], Tensor]:
    """[..., I] -> [..., O] in that dtype. made: of this weight."""
    if not prepacking.serves(weight_OI, dtype):
        return partial(F.linear, weight=weight_OI.to(dtype), bias=bias_O)
    # Prepacked also where it is not kept: several threads round otherwise over plain weights.
    prepacked = made.get(weight_OI, dtype, lambda: prepacking.prepacked_weight(weight_OI.to(dtype)))
    return partial(prepacking.linear, weight=prepacked, bias_O=bias_O)


class GatedLinear(Linear):
    """Two products of one input, of which the GELU of the second gates the first (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__(width_in, 2 * width_out)

    def at(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """As a linear layer's: [..., width in] -> [..., width out]."""
        weight = self.weight
        if not prepacking.serves(weight, dtype):
            return partial(_gated, product=super().at(dtype))
        halves = self.made.get(weight, dtype, lambda: _prepacked_halves(weight.to(dtype)))
        return partial(prepacking.gated, weights=halves, biases=self.bias.chunk(2))


def _gated(x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    value, gate = product(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def _prepacked_halves(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    value, gate = weight_OI.chunk(2)
    return prepacking.prepacked_weight(value), prepacking.prepacked_weight(gate)


class Conv2d(nn.Conv2d):
    """A convolution in the dtype of what comes in: weights may rest in a narrower one (`lay_out_weights`)."""

    def __init__(
        self, channels_in: int, channels_out: int, side: int, *, stride: int = 1, padding: int = 0, bias: bool = True
    ):
        super().__init__(channels_in, channels_out, side, stride=stride, padding=padding, bias=bias)
        self.made = MadeOf()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels in, H, W] -> [B, channels out, ...]."""
        weight, dtype = self.weight, x_BCHW.dtype
        if not prepacking.serves(x_BCHW, dtype):
            return self._conv_forward(x_BCHW, weight.to(dtype), self.bias)
        convolve = self.made.get(weight, dtype, lambda: self._prepacked(weight.to(dtype)))
        return convolve(x_BCHW, self.bias)

    def _prepacked(self, weight: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
        return prepacking.prepacked_convolution(weight, self.stride[0], int(self.padding[0]))


class Conv3x3(Conv2d):
    """A 3 x 3 convolution with a rim of zeros; by Winograd's algorithm where that is faster, and equal up to rounding.

    The filters of that algorithm are made at the first call and kept beside the weights, at up to four times the memory
    that these take in float32; where memory is spared (`spare_memory`) they are never made.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1)

    def forward(self, x_BCHW: Tensor, shift_BC: Tensor | None = None) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H, W]; shift: added to every cell, [B, channels_out]."""
        form = None if self.made.sparing else winograd.form_for(self.weight, x_BCHW)
        if form is None:
            out_BCHW = super().forward(x_BCHW)
            return out_BCHW if shift_BC is None else out_BCHW + shift_BC[:, :, None, None]
        assert self.bias is not None
        bias = self.bias if shift_BC is None else self.bias + shift_BC
        filters = self.made.get(self.weight, form, lambda: winograd.Filters.of(self.weight, form))
        return winograd.convolve(x_BCHW, filters, bias)

    def doubled(self, x_BCHW: Tensor) -> Tensor:
        """Of the map enlarged to twice its sides (nearest): [B, channels_in, H, W] -> [B, channels_out, 2H, 2W].

        The cells of an enlarged map come in fours: each of the four places sees 2 x 2 cells of the small map, by sums
        of the weights, which are 16 multiplications instead of 36. Without the hooks of a call.
        """
        height, width = x_BCHW.shape[2:]
        if not prepacking.serves(x_BCHW, x_BCHW.dtype):
            return self(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        assert self.bias is not None
        make = partial(_four_places, self.weight, x_BCHW.dtype)
        convolve = self.made.get(self.weight, ("doubled", x_BCHW.dtype), make)
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


class Pointwise(Conv2d):
    """A 1 x 1 convolution, as the matrix product that it is: in the channels-last layout nothing is copied for it."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels_out, H, W]."""
        product = _product(self.weight.flatten(1), self.bias, x_BCHW.dtype, self.made)
        return product(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """Groups of channels brought to one mean and deviation (Wu and He 2018, arXiv 1803.08494), in the fastest dtype."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        if not _widening_pays(x_BCHW):
            return super().forward(x_BCHW)
        wide = F.group_norm(x_BCHW.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return wide.to(x_BCHW.dtype)


def _widening_pays(x_BCHW: Tensor) -> bool:
    if x_BCHW.dtype != torch.bfloat16 or not x_BCHW.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x_BCHW.shape[2] * x_BCHW.shape[3] < _CELLS_OF_SLOW_NORMS


def lay_out_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring small weights into the dtype that a CPU computes in, and plain convolutions' into the layout of their maps.

    Else each call does so anew, as it does for the large ones: these are nearly all of a model, loading would take
    longer, and they would no longer lie in the pages of its file. For most of them stands what Winograd's algorithm or
    prepacking made of them.
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
            layer.made = MadeOf(sparing)
