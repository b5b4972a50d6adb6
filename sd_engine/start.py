"""Where a row starts from: pure noise, or a noised picture.

Legend of the shape suffixes: C channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from sd_engine.latents import encode_picture
from sd_engine.model import Model
from sd_engine.noise import NoiseSource
from sd_engine.row import Row


def start(model: Model, row: Row, noise: NoiseSource) -> Tensor:
    """The latent that the row starts from, float32 [C, H, W] on the device.

    The order of the draws is the reference's: sample of the init image, noise, then steps.
    """
    request, table = row.request, row.table
    shape = (model.latent_channels, row.lane.height // model.factor, row.lane.width // model.factor)
    if request.init_image is None:
        return noise.draw(shape).to(model.device) * table.init_noise_scale
    pixels_3HW = _as_pixels(request.init_image, row.lane.height, row.lane.width)
    latent_CHW = encode_picture(model, pixels_3HW, noise.draw(shape))
    return latent_CHW * table.init_image_scale + noise.draw(shape).to(model.device) * table.add_noise_scale


def _as_pixels(image: npt.NDArray[np.uint8], height: int, width: int) -> Tensor:
    """uint8 [H, W, 3] of any size -> float32 [3, height, width] in [-1, 1], resized as the reference does."""
    picture = Image.fromarray(image)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
