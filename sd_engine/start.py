"""Where a row starts from: noise, a noised picture, a picture of which a part is kept, the pass before.

Legend of the shape suffixes: C channels, H height, W width; 1 and 3 are channels of a mask and of a picture.
Order of draws, masks and blending: `StableDiffusionInpaintPipeline` of diffusers 0.42, held to it in
`tests/engine/test_inpaint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_engine.errors import NonFinite
from sd_engine.latents import decode_latents, encode_picture, rounded
from sd_engine.masks import init_of, mask_of
from sd_engine.model import Model
from sd_engine.noise import NoiseSource
from sd_engine.pictures import Pixels, fit
from sd_engine.row import Inpaint, Row

_DRAWN_ANEW = 128  # the reference draws anew where a mask is at least a half


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What a row begins with, on the device: see `Row.state` (its first slot), `Row.inpaint`, `Row.condition`."""

    latent_CHW: Tensor
    inpaint: Inpaint | None = None
    condition: Tensor | None = None


def start(model: Model, row: Row, noise: NoiseSource) -> Start:
    """What the row begins with, float32. Raises NonFinite for a picture to enlarge that is not finite.

    The order of the draws is the reference's: sample of the picture that is started from, noise, sample of the picture
    that is kept; then steps. Inpainting at strength 1 starts from noise alone, and so does every row without a picture.
    """
    clean_CHW = _clean(model, row, noise)
    noise_CHW = noise.draw(_shape(model, row)).to(model.device)
    if clean_CHW is None or _from_noise(model, row):
        latent_CHW = noise_CHW * row.table.init_noise_scale
    else:
        latent_CHW = clean_CHW * row.table.init_image_scale + noise_CHW * row.table.add_noise_scale
    if model.inpainting:
        return Start(latent_CHW, condition=_condition(model, row, noise))
    if row.request.mask is None:
        return Start(latent_CHW)
    return Start(latent_CHW, inpaint=Inpaint(_kept_mask(model, row), _kept(model, row, noise, clean_CHW), noise_CHW))


def _shape(model: Model, row: Row) -> tuple[int, int, int]:
    return model.latent_channels, row.lane.height // model.factor, row.lane.width // model.factor


def _from_noise(model: Model, row: Row) -> bool:
    """Whether a picture given plays no part in x. A U-Net for inpainting takes no mask for a mask of all."""
    inpainted = model.inpainting or row.request.mask is not None
    return inpainted and row.request.strength == 1.0 and row.first_pass is None


def _clean(model: Model, row: Row, noise: NoiseSource) -> Tensor | None:
    """The latent that the row starts from; None where only noise is needed, and then nothing is drawn."""
    if row.first_pass is not None:
        return _enlarged(model, row, row.first_pass, noise)
    if row.request.init_image is None or (model.inpainting and _from_noise(model, row)):
        return None
    return encode_picture(model, _as_pixels(init_of(row)), noise.draw(_shape(model, row)))


def _enlarged(model: Model, row: Row, first_CHW: Tensor, noise: NoiseSource) -> Tensor:
    """The first pass at the second's size: its latent bilinearly (nothing is drawn), or its picture by Lanczos."""
    shape = _shape(model, row)
    if row.request.upscale_by == "latent":
        return F.interpolate(first_CHW[None], shape[1:], mode="bilinear", align_corners=False, antialias=False)[0]
    picture_BCHW = decode_latents(model, first_CHW[None])
    if not bool(picture_BCHW.isfinite().all()):
        # Rounded to 256 levels, NaN would be an ordinary black, and the second pass would draw on it.
        raise NonFinite("the picture of the first pass is not finite: try float32, or less guidance")
    larger = fit(rounded(picture_BCHW)[0].numpy(), row.lane.height, row.lane.width)
    return encode_picture(model, _as_pixels(larger), noise.draw(shape))


def _kept(model: Model, row: Row, noise: NoiseSource, clean_CHW: Tensor | None) -> Tensor:
    """The latent of the picture whose unmasked part is kept.

    In the first pass that is the one started from; the reference encodes the masked picture too and does not use it,
    so a draw is skipped. In the second it is the init image again, at the larger size: its detail is not lost.
    """
    sample_CHW = noise.draw(_shape(model, row))
    if row.first_pass is None:
        assert clean_CHW is not None, "a mask comes with an init image"
        return clean_CHW
    return encode_picture(model, _as_pixels(init_of(row)), sample_CHW)


def _kept_mask(model: Model, row: Row) -> Tensor:
    """float32 [1, h, w]: hard, a pixel for its cell, as the reference's, of a blurred mask too (`masks.with_kept`)."""
    return _hard(mask_of(row))[:, :: model.factor, :: model.factor].to(model.device)


def _condition(model: Model, row: Row, noise: NoiseSource) -> Tensor:
    """float32 [1 + C, h, w]: the hard mask, and the latent of the picture with grey where it is drawn anew.

    Without a mask (txt2img, img2img) all is drawn anew.
    """
    hard_1HW = torch.ones(1, row.lane.height, row.lane.width) if row.request.mask is None else _hard(mask_of(row))
    masked_3HW = torch.zeros(3, *hard_1HW.shape[1:])
    if row.request.init_image is not None:
        masked_3HW = _as_pixels(init_of(row)) * (1 - hard_1HW)
    masked_CHW = encode_picture(model, masked_3HW, noise.draw(_shape(model, row)))
    return torch.cat([hard_1HW[:, :: model.factor, :: model.factor].to(masked_CHW), masked_CHW])


def _hard(mask: Pixels) -> Tensor:
    return torch.from_numpy(mask >= _DRAWN_ANEW).float()[None]


def _as_pixels(image: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
