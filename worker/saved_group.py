"""The images of a claim that is given up half-way, as one blob: those drawn already, and the rows of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sd_engine import Request, SavedRowUnusable
from sd_engine.fingerprints import request_fingerprint
from sd_engine.request import MAX_SIDE
from sd_engine.sealed import Array, seal, unseal

KIND: Final = "nightshift claim"
VERSION: Final = 1

# Of one image, or of one row: a row's numbers (seven latents at most) are fewer bytes than its pixels.
_MOST_BYTES: Final = 3 * MAX_SIDE**2


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """By place in the claim: images that are drawn (uint8 ``[H, W, 3]``), and the bytes of rows that go on."""

    images: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    rows: Mapping[int, bytes] = field(default_factory=dict)


def seal_group(requests: Sequence[Request], group: SavedGroup) -> bytes:
    """The group of these requests as bytes."""
    words = {f"request.{place}": request_fingerprint(requests[place]) for place in group.images}
    arrays: dict[str, Array] = {f"image.{place}": np.ascontiguousarray(image) for place, image in group.images.items()}
    arrays |= {f"row.{place}": np.frombuffer(row, np.uint8) for place, row in group.rows.items() if row}
    return seal(KIND, VERSION, words, arrays)


def unseal_group(requests: Sequence[Request], data: bytes) -> SavedGroup:
    """What ``seal_group`` made of the same requests; whether a row is usable, the engine says.

    Raises ``SavedRowUnusable`` for bytes that are damaged, or with images of other requests.
    """
    words, arrays = unseal(KIND, VERSION, data, limit=len(requests) * _MOST_BYTES)
    images: dict[int, NDArray[np.uint8]] = {}
    rows: dict[int, bytes] = {}
    for place, request in enumerate(requests):
        image, row = arrays.pop(f"image.{place}", None), arrays.pop(f"row.{place}", None)
        if image is not None:
            if words.get(f"request.{place}") != request_fingerprint(request) or image.shape[2:] != (3,):
                raise SavedRowUnusable(f"its image {place} is of another request")
            images[place] = _bytes(image)
        elif row is not None:
            rows[place] = _bytes(row).tobytes()
    if arrays:
        raise SavedRowUnusable(f"it has {len(arrays)} parts more than {len(requests)} images have")
    return SavedGroup(images, rows)


def _bytes(array: Array) -> NDArray[np.uint8]:
    if array.dtype != np.uint8:
        raise SavedRowUnusable(f"a part is of {array.dtype}, not of bytes")
    return array.astype(np.uint8)
