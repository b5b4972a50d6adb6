"""What the U-Net attends to: the keys and values of one prompt, and those of a pack.

Legend of the shape suffixes: U U-Net rows, R those of a run, G attention heads, T text tokens, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sd_engine.blocks import KeysValues
from sd_engine.merging import Merging


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """One prompt, as the cross-attention layers of a U-Net see it.

    layers: keys and values in one tensor [2, G, T, K] for each layer, in the order of `UNet.blocks`.
    """

    layers: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """How many text tokens there are."""
        return self.layers[0].shape[2]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(layer.nbytes for layer in self.layers)


@dataclass(frozen=True, slots=True, eq=False)
class PackContext:
    """The contexts of a pack's U-Net rows, in runs of neighbours with equally many tokens.

    A run attends in one call of its own: so there is no padding and no mask, and what a row attends to is the same
    whatever the prompts of its neighbours are.

    merging: how the rows attend to themselves, where not position by position.
    """

    runs: tuple[tuple[Context, ...], ...]
    merging: Merging | None = None

    def merging_at(self, size: torch.Size) -> Merging | None:
        """The merging of feature maps of this height and width."""
        merging = self.merging
        return merging if merging is not None and tuple(size) == (merging.height, merging.width) else None

    def layer(self, index: int) -> list[KeysValues]:
        """Keys and values of one layer, each [R, G, T, K], of every run in order.

        Stacked only when the layer asks: those of all layers would be alive at once otherwise.
        """
        stacked = (torch.stack([context.layers[index] for context in run]) for run in self.runs)
        return [(each[:, 0], each[:, 1]) for each in stacked]


def join(contexts: Sequence[Context], *, apart: bool = False, merging: Merging | None = None) -> PackContext:
    """The contexts of a pack's U-Net rows, as the U-Net takes them.

    apart: each row is a run. On CPUs the attention of few positions rounds by the number of rows of its call, which
    would let the neighbours' prompts choose a row's bits.
    """
    if apart:
        return PackContext(tuple((context,) for context in contexts), merging)
    runs = groupby(contexts, key=lambda context: context.tokens)
    return PackContext(tuple(tuple(run) for _, run in runs), merging)


def tokens(context: Context) -> int:
    """How many text tokens the context has: rows with equally many should be neighbours in a pack."""
    return context.tokens
