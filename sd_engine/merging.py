"""Tokens that are alike attend as one: token merging for the self-attention of large pictures.

Source: Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604). Of each square of 2 x 2
positions the first is a destination; so many of the other positions as the ratio says, those most like a destination,
are averaged into it before the attention, and get its result after it. The paper draws the destinations by chance;
here they are fixed, so that a picture depends on nothing but its request.

Legend of the shape suffixes: U U-Net rows, N positions (H*W), M merged tokens, D width of a token, S positions that
are no destinations, T destinations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Of likenesses at a time: 64 MB in float32. At 1024 x 1024 pixels all of a row's would be 200 MB.
_LIKENESSES: Final = 2**24


@dataclass(frozen=True, slots=True)
class Merging:
    """ratio: the share of the positions that is merged away. height, width: of the feature maps that it is for."""

    ratio: float
    height: int
    width: int

    def around(self, attention: Callable[[Tensor], Tensor], x_UND: Tensor) -> Tensor:
        """The attention over merged tokens, spread to all positions again: [U, N, D] -> [U, N, D]."""
        # Row by row: which tokens are merged must not depend on how a product with the neighbours' rounds.
        places_UN = torch.stack([self._places(x_ND) for x_ND in x_UND])
        wide_UND = places_UN[..., None].expand_as(x_UND)
        tokens = self.height * self.width - self._away
        sums_UMD = x_UND.new_zeros(len(x_UND), tokens, x_UND.shape[2]).scatter_add(1, wide_UND, x_UND)
        counts_UM = x_UND.new_zeros(len(x_UND), tokens).scatter_add(1, places_UN, torch.ones_like(x_UND[..., 0]))
        return attention(sums_UMD / counts_UM[..., None]).gather(1, wide_UND)

    @property
    def _away(self) -> int:
        sources = self.height * self.width - ((self.height + 1) // 2) * ((self.width + 1) // 2)
        return min(int(self.ratio * self.height * self.width), sources)

    def _places(self, x_ND: Tensor) -> Tensor:
        """The merged token that each position goes into and is filled from: int64 [N], from 0 to M - 1."""
        grid = torch.arange(len(x_ND), device=x_ND.device).view(self.height, self.width)
        is_destination = torch.zeros_like(grid, dtype=torch.bool)
        is_destination[::2, ::2] = True
        destinations_T, sources_S = grid[is_destination], grid[~is_destination]
        likeness_S, nearest_S = _nearest(x_ND[sources_S], x_ND[destinations_T])
        order_S = likeness_S.argsort(descending=True, stable=True)
        away, stay = order_S[: self._away], order_S[self._away :]
        places_N = torch.empty_like(grid).flatten()
        places_N[destinations_T] = torch.arange(len(destinations_T), device=x_ND.device)
        places_N[sources_S[stay]] = torch.arange(len(stay), device=x_ND.device) + len(destinations_T)
        places_N[sources_S[away]] = nearest_S[away]
        return places_N


def _nearest(sources_SD: Tensor, destinations_TD: Tensor) -> tuple[Tensor, Tensor]:
    """For each source the cosine to the destination most like it, and which that is: [S], [S]."""
    towards_DT = F.normalize(destinations_TD, dim=-1).T
    parts = F.normalize(sources_SD, dim=-1).split(max(1, _LIKENESSES // len(destinations_TD)))
    found = [(part @ towards_DT).max(dim=-1) for part in parts]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])
