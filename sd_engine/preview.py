"""A rough picture of a row in flight, a pixel for each latent cell: fast enough for every step.

The colours of a latent are about a linear map of its channels. Every model's own map is fitted by least squares on
patchwork that its VAE encodes, so it needs no further weights. What it shows is coarse, and its colours are 40 of 256
levels off for the shipped model (the best linear map there is: 23; chance: 82): for watching, not for keeping.

Legend of the shape suffixes: P pictures, N positions of all of them, C latent channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_engine.latents import encode_picture, rounded
from sd_engine.model import Model
from sd_engine.row import Row

_PICTURES: Final = 24
_CELLS: Final = 8  # along a side of each
_PATCHES: Final = 4  # of one colour, along a side


class Previewer:
    """Previews of the rows of these models. A model's map is fitted when its first preview is asked for."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._maps: dict[str, Tensor] = {}

    @torch.inference_mode()
    def preview(self, row: Row) -> npt.NDArray[np.uint8] | None:
        """The picture that the row's last step expects in the end, uint8 [h, w, 3]; None before its first step."""
        if row.denoised is None:
            return None
        name = row.lane.model
        if name not in self._maps:
            self._maps[name] = fitted(self._models[name])
        latent_HWC = row.denoised.permute(1, 2, 0).float().cpu()
        pixels_HW3 = F.pad(latent_HWC, (0, 1), value=1.0) @ self._maps[name]
        return rounded(pixels_HW3.permute(2, 0, 1)[None])[0].numpy()


def fitted(model: Model) -> Tensor:
    """The map from a latent's channels (and 1) to red, green and blue in [-1, 1]: float32 [C + 1, 3], on the CPU."""
    dice = torch.Generator().manual_seed(0)
    patches_P3HW = torch.rand(_PICTURES, 3, _PATCHES, _PATCHES, generator=dice) * 2 - 1
    side = _CELLS * model.factor
    pictures_P3HW = F.interpolate(patches_P3HW, size=(side, side), mode="nearest")
    silence_CHW = torch.zeros(model.latent_channels, _CELLS, _CELLS)
    latents_PCHW = torch.stack([encode_picture(model, picture, silence_CHW).cpu() for picture in pictures_P3HW])
    inputs_NC = F.pad(latents_PCHW.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
    colours_N3 = F.avg_pool2d(pictures_P3HW, model.factor).permute(0, 2, 3, 1).flatten(0, 2)
    # In float64: its last bits depend on where the numbers happen to lie in memory.
    return torch.linalg.lstsq(inputs_NC.double(), colours_N3.double()).solution.float()
