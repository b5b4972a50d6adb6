"""Pictures to latents and back, within the memory that the device has.

Legend of the shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sd_engine.model import Model
from sd_engine.row import Row

# Pictures decoded by one call: the VAE's full-size feature maps take far more memory than the U-Net's.
DECODE_BATCH = 4


def encode_picture(model: Model, pixels_3HW: Tensor, noise_CHW: Tensor) -> Tensor:
    """A picture float32 [3, H, W] in [-1, 1], and noise for the sample -> its scaled latent, float32 on the device."""
    with model.at_work("vae"):
        pixels_BCHW = pixels_3HW.to(model.device, model.dtype)[None]
        return model.vae.encode(pixels_BCHW, noise_CHW.to(model.device, model.dtype)[None])[0].float()


def decode_latents(model: Model, latents_BCHW: Tensor) -> Tensor:
    """Scaled latents -> pictures float32 [B, 3, H, W] on the CPU, about [-1, 1], not clamped."""
    with model.at_work("vae"):
        return model.vae.decode(latents_BCHW.to(model.dtype)).float().cpu()


def rounded(pixels_BCHW: Tensor) -> Tensor:
    """Decoded pictures float32 [B, 3, H, W] -> uint8 [B, H, W, 3]; what is not finite becomes black."""
    return (pixels_BCHW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).mul(255).round().nan_to_num().to(torch.uint8)


def decode_batches(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same lane, at most DECODE_BATCH together."""
    lanes: dict[object, list[Row]] = {}
    for row in rows:
        lanes.setdefault(row.lane, []).append(row)
    return [lane[i : i + DECODE_BATCH] for lane in lanes.values() for i in range(0, len(lane), DECODE_BATCH)]
