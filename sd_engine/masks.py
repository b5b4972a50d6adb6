"""What a row's mask keeps: at the size that is drawn, hard in the steps, soft in the picture."""

from __future__ import annotations

import numpy as np

from sd_engine.pictures import Pixels, fit, fit_mask
from sd_engine.row import Row


def mask_of(row: Row) -> Pixels:
    """The mask, uint8 [height, width] of the row's lane; its blur grows with the picture."""
    request = row.request
    assert request.mask is not None
    scale = request.upscale if row.first_pass is not None and request.upscale is not None else 1.0
    return fit_mask(request.mask, row.lane.height, row.lane.width, request.resize, request.mask_blur * scale)


def init_of(row: Row) -> Pixels:
    """The init image, uint8 [height, width, 3] of the row's lane."""
    request = row.request
    assert request.init_image is not None
    return fit(request.init_image, row.lane.height, row.lane.width, request.resize)


def with_kept(row: Row, drawn: Pixels) -> Pixels:
    """The drawn picture, uint8 [H, W, 3]; of a blurred mask, over the init image, by as much as the mask says.

    Blending in the steps instead would take the soft part away again at each of them: of a cell with mask m, only
    m^steps would be left of what was drawn.
    """
    if row.request.mask is None or not row.request.mask_blur:
        return drawn
    mask_HW1 = mask_of(row)[..., None] / np.float32(255)
    return np.rint(drawn * mask_HW1 + init_of(row) * (1 - mask_HW1)).astype(np.uint8)
