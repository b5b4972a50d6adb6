"""The VAE tile by tile: a picture larger than the device's memory allows, the same as if it had been done at once.

Tiles that are decoded on their own show seams, and blending hides but does not mend them: each tile has normalised by
its own statistics. Here the picture advances as a whole, from layer to layer. A map of features lies at home, on the
CPU; a tile of it visits the device, with as many cells around it as one layer looks at, and the result goes home. Each
GroupNorm takes the statistics of the whole picture, gathered while the map before it was written. So no cell knows that
there were tiles, and none is computed twice but for the one-cell rim: only the order of sums differs.

The mid block, with its attention over all positions, runs whole: at latent resolution it is small.

Legend of the shape suffixes: B batch, C channels, H height, W width, G groups of a norm, K channels
of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.blocks import Downsample, ResBlock, Upsample
from sd_engine.vae import Decoder, Encoder, Level

# Side of a tile, in the cells that a layer gives: enough to keep a device busy, and no more of its memory than what
# runs whole takes at 2048 x 2048 pixels. Tiles read a rim of one cell twice, which costs 1.6 per cent at this side.
TILE = 256

_HOME = torch.device("cpu")
_Tile = tuple[slice, slice]  # rows and columns


@torch.no_grad()
def decode_in_tiles(decoder: Decoder, z_BCHW: Tensor, tile: int = TILE) -> Tensor:
    """What `decoder(z)` gives, [B, 3, H, W], but on the CPU."""
    walk = _Walk(z_BCHW.device, tile)
    map_ = _Map.of(decoder.neck(z_BCHW))
    for level in decoder.levels:
        map_ = walk.level(level, map_)
    return walk.layer(decoder.conv_out, map_, decoder.conv_norm_out).values_BCHW


@torch.no_grad()
def encode_in_tiles(encoder: Encoder, x_BCHW: Tensor, tile: int = TILE) -> Tensor:
    """What `encoder(x)` gives, [B, 2 * latent channels, H / factor, W / factor], on the same device."""
    walk = _Walk(x_BCHW.device, tile)
    map_ = walk.layer(encoder.conv_in, _Map.of(x_BCHW))
    for level in encoder.levels:
        map_ = walk.level(level, map_)
    return encoder.head(map_.values_BCHW.to(x_BCHW.device))


class _Statistics:
    """Mean and sum of squared deviations of each channel, gathered part by part in float64.

    Parts are merged as in Chan, Golub and LeVeque 1979: a plain sum of squares would lose the variance where the mean
    is large.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean_BC = self.squares_BC = torch.zeros(1, 1, dtype=torch.float64)

    def add(self, part_BCHW: Tensor) -> None:
        """Take in further cells; their own mean and variance are taken in float32, on their device."""
        added = part_BCHW.shape[2] * part_BCHW.shape[3]
        both = torch.var_mean(part_BCHW.float(), dim=(2, 3), correction=0)
        variance_BC, mean_BC = (each.to(_HOME).double() for each in both)
        share = added / (self.count + added)
        apart_BC = mean_BC - self.mean_BC
        self.mean_BC = self.mean_BC + share * apart_BC
        self.squares_BC = self.squares_BC + added * variance_BC + self.count * share * apart_BC.square()
        self.count += added

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of channels, [B, C] each: a group's values are repeated for its channels."""
        each_BGK, squares_BGK = (x_BC.unflatten(1, (groups, -1)) for x_BC in (self.mean_BC, self.squares_BC))
        mean_BG = each_BGK.mean(dim=2)
        apart_BGK = each_BGK - mean_BG[:, :, None]
        variance_BG = (squares_BGK / self.count + apart_BGK.square()).mean(dim=2)
        width = each_BGK.shape[2]
        return mean_BG.repeat_interleave(width, dim=1), variance_BG.repeat_interleave(width, dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class _Map:
    """Features of a whole picture, at home, and the statistics that a norm after them needs."""

    values_BCHW: Tensor
    statistics: _Statistics

    @classmethod
    def of(cls, values_BCHW: Tensor) -> _Map:
        """What was computed at once."""
        statistics = _Statistics()
        statistics.add(values_BCHW)
        return cls(values_BCHW.to(_HOME), statistics)

    def normalise(self, norm: nn.GroupNorm, part_BCHW: Tensor) -> Tensor:
        """A part of the map through the norm, in float32 as PyTorch's own GroupNorm, and SiLU."""
        mean_BC, variance_BC = self.statistics.of_groups(norm.num_groups)
        scale_BC = norm.weight.to(_HOME).double() / (variance_BC + norm.eps).sqrt()
        shift_BC = norm.bias.to(_HOME).double() - mean_BC * scale_BC
        scale, shift = (x_BC.float()[:, :, None, None].to(part_BCHW.device) for x_BC in (scale_BC, shift_BC))
        return F.silu(torch.addcmul(shift, part_BCHW.float(), scale).to(part_BCHW.dtype), inplace=True)


@dataclass(frozen=True, slots=True)
class _Walk:
    """Takes maps through the VAE's own modules, with one tile on the device at a time."""

    device: torch.device
    tile: int

    def level(self, level: nn.Module, map_: _Map) -> _Map:
        """As `Level.forward`."""
        assert isinstance(level, Level)
        for block in level.resnets:
            map_ = self.block(block, map_)
        return map_ if level.resample is None else self.layer(level.resample, map_)

    def block(self, block: nn.Module, map_: _Map) -> _Map:
        """As `ResBlock.forward`. Where no shortcut changes the channels, the new map takes the place of the old one."""
        assert isinstance(block, ResBlock)
        inner = self.layer(block.conv1, map_, block.norm1)
        out_BCHW = map_.values_BCHW if block.conv_shortcut is None else None
        return self.layer(block.conv2, inner, block.norm2, lambda at: block.skip(self._visit(map_, at)), out_BCHW)

    def layer(
        self,
        layer: nn.Module,
        map_: _Map,
        norm: nn.GroupNorm | None = None,
        skip: Callable[[_Tile], Tensor] | None = None,
        out_BCHW: Tensor | None = None,
    ) -> _Map:
        """Norm and activation if there is a norm, then a layer that sees one cell around, then a skip if there is one.

        skip: what to add to a tile. out: where to write, else into new memory.
        """
        out_BCHW = _room(layer, map_.values_BCHW) if out_BCHW is None else out_BCHW
        statistics = _Statistics()
        for tile in _tiles(out_BCHW, self.tile):
            source, given = _source(layer, map_.values_BCHW, tile)
            part_BCHW = self._visit(map_, source)
            if norm is not None:
                part_BCHW = map_.normalise(norm, part_BCHW)
            part_BCHW = layer(part_BCHW)[..., *given]
            if skip is not None:
                part_BCHW = skip(tile) + part_BCHW
            statistics.add(part_BCHW)
            out_BCHW[..., *tile].copy_(part_BCHW)
        return _Map(out_BCHW, statistics)

    def _visit(self, map_: _Map, at: _Tile) -> Tensor:
        return map_.values_BCHW[..., *at].to(self.device)


def _tiles(out_BCHW: Tensor, side: int) -> Iterator[_Tile]:
    """Tiles of at most side x side that cover a map."""
    starts = (range(0, limit, side) for limit in out_BCHW.shape[-2:])
    for y, x in product(*starts):
        yield slice(y, min(y + side, out_BCHW.shape[-2])), slice(x, min(x + side, out_BCHW.shape[-1]))


def _source(layer: nn.Module, values_BCHW: Tensor, tile: _Tile) -> tuple[_Tile, _Tile]:
    """What a layer must see for a tile of its output, and where the tile then lies in what it gives.

    Outside of a picture the layer pads with zeros, and so it does around what it sees: those outputs are left out.
    """
    (rows, given_rows), (columns, given_columns) = (
        _span(layer, along.start, along.stop, limit) for along, limit in zip(tile, values_BCHW.shape[-2:], strict=True)
    )
    return (rows, columns), (given_rows, given_columns)


def _span(layer: nn.Module, start: int, stop: int, limit: int) -> tuple[slice, slice]:
    """`_source` along one side, of which the layer's input has `limit` cells."""
    if isinstance(layer, Downsample):  # output i sees 2i .. 2i + 2
        source, first = slice(2 * start, min(2 * stop + 1, limit)), start
    elif isinstance(layer, Upsample):  # output i sees (i - 1) / 2 .. (i + 1) / 2
        source = slice(max(start - 1, 0) // 2, min(stop // 2 + 1, limit))
        first = 2 * source.start
    else:  # output i sees i - 1 .. i + 1
        source = slice(max(start - 1, 0), min(stop + 1, limit))
        first = source.start
    return source, slice(start - first, stop - first)


def _room(layer: nn.Module, values_BCHW: Tensor) -> Tensor:
    """Memory at home for what a layer makes of a map."""
    conv = layer.conv if isinstance(layer, Downsample | Upsample) else layer
    assert isinstance(conv, nn.Conv2d)
    sides: list[int] = list(values_BCHW.shape[-2:])
    if isinstance(layer, Downsample):
        sides = [side // 2 for side in sides]
    elif isinstance(layer, Upsample):
        sides = [2 * side for side in sides]
    return values_BCHW.new_empty(values_BCHW.shape[0], conv.out_channels, *sides)
