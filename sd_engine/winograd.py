"""3 x 3 convolutions with fewer multiplications, by Winograd's minimal filtering: for CPUs, in float32.

Tiles of m x m outputs are computed from (m + 2) x (m + 2) inputs by one matrix product for each of the (m + 2)^2
positions of a tile, between two small fixed linear maps. Of the multiplications of the plain sum, 1/2.25 (m = 2) or a
quarter (m = 4) are left, and they are large matrix products, which a CPU does best. It is the same sum, rounded
otherwise: m = 2 is closer to the exact one than oneDNN's direct convolution is, m = 4 about four times as far from it
(some 1e-5 of the values).

Legend of the shape suffixes: U batch, H height, W width, C channels in, O channels out, A positions of a tile
((m + 2)^2), P tiles.
Source: Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks" (arXiv 1509.09308).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_engine import prepacking

# Below these the maps at both ends cost more than the multiplications that are saved (two cores with AVX2).
_LEAST_CHANNELS = 128
_LEAST_CELLS = 36
# From so many channels on any map is worth it: the plain one takes two to seven times as long to read its weights.
_WIDE, _LEAST_CELLS_WIDE = 512, 4
# Fewer cells make too few tiles of 4 x 4 for the large filters to be worth reading.
_LEAST_CELLS_F4 = 144

# What one pass over the tiles writes at most, as floats: three such work areas stay in the caches that cores share.
_WORK = 2 * 1024 * 1024

# Weights of which filters are made at once, in float64: so many stay in a core's cache.
_PART = 2**15

_Rows = Sequence[Sequence[float]]


class Form:
    """One of the algorithms F(m x m, 3 x 3): its maps, in the paper's notation.

    gather [A, A] takes a tile's inputs to the products, spread [A, 9] the weights, scatter [m * m, A] the products to a
    tile's outputs.
    """

    def __init__(self, outputs: int, input_map: _Rows, filter_map: _Rows, output_map: _Rows) -> None:
        self.outputs = outputs
        self.inputs = outputs + 2
        self.gather = _both_sides(input_map).float()
        self.spread = _both_sides(filter_map)
        self.scatter = _both_sides(output_map).float()


def _both_sides(map_: _Rows) -> Tensor:
    """A map along one side of a tile -> the map of the flattened tile, along both."""
    along = torch.tensor(map_, dtype=torch.float64)
    return torch.kron(along, along)


F2: Final = Form(
    2,
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    [[1, 1, 1, 0], [0, 1, -1, -1]],
)
F4: Final = Form(
    4,
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
)


def form_for(weight_OC33: Tensor, x_UCHW: Tensor) -> Form | None:
    """The form that is fastest for this convolution; None where the plain one is, or where no form may stand for it.

    Half precision would lose what it has left in the maps, and a GPU's own library chooses by itself. Training wants
    gradients, of weights that change with every step. With AVX-512 (AMD's Zen 5) the plain sum over prepacked weights
    was as fast, for the maps at both ends gain little by wider instructions.
    """
    if x_UCHW.dtype != torch.float32 or not x_UCHW.is_cpu or torch.is_grad_enabled():
        return None
    if torch.compiler.is_compiling():  # filters that are kept would break its graph
        return None
    if prepacking.serves(x_UCHW, x_UCHW.dtype):
        return None
    cells, channels = x_UCHW.shape[2] * x_UCHW.shape[3], min(weight_OC33.shape[:2])
    if channels < _LEAST_CHANNELS or cells < (_LEAST_CELLS_WIDE if channels >= _WIDE else _LEAST_CELLS):
        return None
    return F4 if cells >= _LEAST_CELLS_F4 else F2


@dataclass(frozen=True, slots=True, eq=False)
class Filters:
    """The weights of one convolution, as a form wants them: [A, C, O], A / 9 times the memory of the weights."""

    form: Form
    filters_ACO: Tensor

    @classmethod
    def of(cls, weight_OC33: Tensor, form: Form) -> Filters:
        """Made in float64: it is done once, and its rounding would be in every picture."""
        channels_out, channels_in = weight_OC33.shape[:2]
        filters_ACO = weight_OC33.new_empty(form.inputs**2, channels_in, channels_out, dtype=torch.float32)
        some = max(1, _PART // channels_out)
        for part_OC33, made_ACO in zip(weight_OC33.split(some, 1), filters_ACO.split(some, 1), strict=True):
            taps_9P = part_OC33.permute(2, 3, 1, 0).reshape(9, -1).double()
            made_ACO.copy_((form.spread @ taps_9P).view_as(made_ACO))
        return cls(form, filters_ACO)


def convolve(x_UCHW: Tensor, filters: Filters, bias: Tensor | None) -> Tensor:
    """The 3 x 3 convolution with a rim of zeros: [U, C, H, W] -> [U, O, H, W], in the channels-last layout.

    bias: added to every output; [O], or [U, O] where each picture has its own.
    """
    form, (count, _, height, width) = filters.form, x_UCHW.shape
    m, channels_out = form.outputs, filters.filters_ACO.shape[2]
    down, across = -(-height // m), -(-width // m)
    x_UHWC = F.pad(x_UCHW.permute(0, 2, 3, 1), (0, 0, 1, across * m + 1 - width, 1, down * m + 1 - height))
    out_UHWO = x_UHWC.new_empty(count, down * m, across * m, channels_out)
    per_tile = len(filters.filters_ACO) * max(x_UCHW.shape[1], channels_out)
    bias_UO = None if bias is None else bias.expand(count, channels_out)
    for pictures, rows in _parts(count, down, max(1, _WORK // (per_tile * across))):
        seen_UHWC = x_UHWC[pictures, rows.start * m : rows.stop * m + 2]
        out_UHWO[pictures, rows.start * m : rows.stop * m] = _tiles(
            seen_UHWC, filters, None if bias_UO is None else bias_UO[pictures]
        )
    return out_UHWO[:, :height, :width].permute(0, 3, 1, 2)


def _parts(pictures: int, rows: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Whole pictures, or strips of one, of at most so many rows of tiles."""
    together = max(1, most // rows)
    for first in range(0, pictures, together):
        for top in range(0, rows, most):
            yield slice(first, min(first + together, pictures)), slice(top, min(top + most, rows))


def _tiles(x_UHWC: Tensor, filters: Filters, bias_UO: Tensor | None) -> Tensor:
    """Inputs of whole tiles with their rim, [U, m * rows + 2, m * columns + 2, C] -> [U, m * rows, m * columns, O]."""
    form, channels = filters.form, x_UHWC.shape[3]
    m, positions = form.outputs, form.inputs**2
    tiles_URXCyx = x_UHWC.unfold(1, form.inputs, m).unfold(2, form.inputs, m)
    pictures, down, across = tiles_URXCyx.shape[:3]
    inputs_APC = tiles_URXCyx.permute(4, 5, 0, 1, 2, 3).reshape(positions, -1)
    inputs_APC = (form.gather @ inputs_APC).view(positions, -1, channels)
    products_APO = torch.bmm(inputs_APC, filters.filters_ACO)
    if bias_UO is not None:
        # The product at (1, 1) reaches every output of its tile once.
        products_APO[form.inputs + 1].view(pictures, down * across, -1).add_(bias_UO[:, None])
    out_yx = (form.scatter @ products_APO.flatten(1)).view(m, m, pictures, down, across, -1)
    return out_yx.permute(2, 3, 0, 4, 1, 5).reshape(pictures, down * m, across * m, -1)
