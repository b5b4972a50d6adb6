"""Classifier-free guidance over a pack: how rows spread over U-Net rows, and how their predictions come together.

Legend of the shape suffixes: B rows of a pack, U U-Net rows (a guided row has two), C channels, H height, W width.
Sources: Ho and Salimans 2022 (arXiv 2207.12598); rescaling: Lin et al. 2023 (arXiv 2305.08891), section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sd_engine.devices import sent
from sd_engine.row import Row


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """How B rows spread over U U-Net rows: U -> row; row -> its first and its last U-Net row, and its guidance.

    rows      guided   unguided   guided
    U         0  1     2          3  4       (without the prompt first, then with it)
    source    0  0     1          2  2
    first     0        2          3
    last         1     2             4
    """

    source_U: Tensor
    first_B: Tensor
    last_B: Tensor
    scale_B111: Tensor
    rescale_B111: Tensor | None  # None: no row asks for it

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device, at_least: int = 0) -> Spread:
        """The spread of a pack; the last row is repeated, for nobody, until there are `at_least` U-Net rows."""
        counts = [row.unet_rows for row in rows]
        source = [b for b, n in enumerate(counts) for _ in range(n)]
        source += [len(rows) - 1] * (at_least - len(source))
        last = np.cumsum(counts) - 1
        index = sent(torch.from_numpy(np.stack([last - np.array(counts) + 1, last])), device)
        scale = [row.request.guidance if row.guided else 1.0 for row in rows]
        rescale = [row.request.guidance_rescale if row.guided else 0.0 for row in rows]
        return cls(
            sent(torch.tensor(source), device),
            index[0],
            index[1],
            sent(torch.tensor(scale, dtype=torch.float32), device)[:, None, None, None],
            sent(torch.tensor(rescale), device)[:, None, None, None] if any(rescale) else None,
        )

    def join(self, prediction_UCHW: Tensor) -> Tensor:
        """The U-Net's predictions, float32 -> one for each row, [B, C, H, W]."""
        # An unguided row is its own first and last U-Net row, so its guidance multiplies zero.
        first_BCHW, last_BCHW = prediction_UCHW[self.first_B], prediction_UCHW[self.last_B]
        joined_BCHW = first_BCHW + self.scale_B111 * (last_BCHW - first_BCHW)
        if self.rescale_B111 is None:
            return joined_BCHW
        deviations = last_BCHW.std((1, 2, 3), keepdim=True) / joined_BCHW.std((1, 2, 3), keepdim=True)
        rescaled_BCHW = self.rescale_B111 * (joined_BCHW * deviations) + (1 - self.rescale_B111) * joined_BCHW
        # A neighbour's wish must not change a row's bits, nor its NaN be made from a deviation of zero.
        return torch.where(self.rescale_B111 > 0, rescaled_BCHW, joined_BCHW)
