"""Pictures in: read from files, brought to the size that is drawn, masks too. Numpy and Pillow, no torch.

Geometry and resampling are those of the reference's `VaeImageProcessor`, so that an init image of any shape gives the
reference's picture; `fit` says where ours differs.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from sd_engine.errors import InvalidRequest
from sd_engine.request import Resize

Pixels = npt.NDArray[np.uint8]

# A picture only has to cover the largest one that we draw; these bounds keep a small file that decodes to gigabytes
# from taking the memory.
MAX_BYTES: Final = 20 * 2**20
MAX_PIXELS: Final = 32 * 10**6
FORMATS: Final = ("PNG", "JPEG", "WEBP")

_WHITE: Final = (255, 255, 255, 255)
_LANCZOS: Final = Image.Resampling.LANCZOS


def read_picture(source: Path | bytes, name: str = "init_image") -> Pixels:
    """The first picture of a PNG, JPEG or WebP, turned as its EXIF orientation says: uint8 [H, W, 3], or [H, W, 4].

    Four channels only where it has transparent parts. name: the field that a refusal names.
    Raises InvalidRequest for what is too large, no such file, or cannot be decoded whole.
    """
    picture = _open(source, name)
    return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))


def read_mask(source: Path | bytes, name: str = "mask") -> Pixels:
    """A mask from a file, as `read_picture`: its brightness, uint8 [H, W]; transparent parts are 0 (kept)."""
    picture = _open(source, name)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L"))
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, picture.convert("RGBA")).convert("L"))


def fit(image: Pixels, height: int, width: int, resize: Resize = "stretch") -> Pixels:
    """A picture uint8 [H, W, 3 or 4] of any size -> uint8 [height, width, 3], resampled by Lanczos.

    stretch: both sides to their length. crop: just covering, the longer sides cut off evenly. fill: whole and centred,
    its outer edges continued. A picture of the right size is not resampled. These are the reference's
    `default`, `crop` and `fill`, but for two of its limits: transparent parts become white (it drops alpha, and shows
    whatever colour was under it), and a picture so long that its short side would vanish keeps one pixel of it.
    """
    return np.asarray(_resized(Image.fromarray(on_white(image)), height, width, resize))


def fit_mask(mask: Pixels, height: int, width: int, resize: Resize = "stretch", blur: float = 0.0) -> Pixels:
    """A mask uint8 [H, W] -> uint8 [height, width], by the geometry of `fit`, then blurred.

    blur: deviation of the Gaussian, in pixels of the result (Pillow's, as the reference's `blur`; there the mask is
    blurred at its own size).
    """
    picture = _resized(Image.fromarray(mask), height, width, resize)
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)) if blur else picture)


def on_white(image: Pixels) -> Pixels:
    """uint8 [H, W, 3 or 4] -> uint8 [H, W, 3], as it looks on white paper."""
    if image.shape[2] == 3:
        return image
    white = Image.new("RGBA", image.shape[1::-1], _WHITE)
    return np.asarray(Image.alpha_composite(white, Image.fromarray(image)).convert("RGB"))


def _resized(picture: Image.Image, height: int, width: int, resize: Resize) -> Image.Image:
    if picture.size == (width, height):
        return picture
    if resize == "stretch":
        return picture.resize((width, height), _LANCZOS)
    inner = _inner_size(picture.size, height, width, covering=resize == "crop")
    resized = picture.resize(inner, _LANCZOS)
    return _cut(resized, height, width) if resize == "crop" else _continued(resized, height, width)


def _inner_size(size: tuple[int, int], height: int, width: int, *, covering: bool) -> tuple[int, int]:
    """(width, height) of the size's shape that just covers height x width, or just fits into it; rounded down."""
    wide, high = size
    if (width * high > height * wide) == covering:
        return width, max(high * width // wide, 1)
    return max(wide * height // high, 1), height


def _cut(picture: Image.Image, height: int, width: int) -> Image.Image:
    left, top = picture.width // 2 - width // 2, picture.height // 2 - height // 2
    return picture.crop((left, top, left + width, top + height))


def _continued(picture: Image.Image, height: int, width: int) -> Image.Image:
    left, top = width // 2 - picture.width // 2, height // 2 - picture.height // 2
    whole = Image.new(picture.mode, (width, height))
    if top:
        for edge, y in ((0, 0), (picture.height, top + picture.height)):
            whole.paste(picture.resize((width, top), box=(0, edge, width, edge)), (0, y))
    if left:
        for edge, x in ((0, 0), (picture.width, left + picture.width)):
            whole.paste(picture.resize((left, height), box=(edge, 0, edge, height)), (x, 0))
    whole.paste(picture, (left, top))
    return whole


def _open(source: Path | bytes, name: str) -> Image.Image:
    """The decoded picture, upright, in any mode of eight bits."""
    data = _bytes(source, name)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                found = f"{image.width} x {image.height} pixels"
                raise InvalidRequest(name, found, f"at most {MAX_PIXELS} pixels in all", "send a smaller image")
            return _eight_bits(ImageOps.exif_transpose(image))
    except (InvalidRequest, MemoryError):
        raise
    except UnidentifiedImageError as error:
        allowed = f"one of {', '.join(FORMATS)}"
        raise InvalidRequest(name, f"{len(data)} bytes of something else", allowed, "convert it") from error
    except Exception as error:  # a broken file makes Pillow's parsers raise whatever they stumble over, TypeError too
        found = f"{len(data)} bytes that cannot be decoded ({error})"
        raise InvalidRequest(name, found, f"a whole {', '.join(FORMATS)} image", "send the file again") from error


def _bytes(source: Path | bytes, name: str) -> bytes:
    if isinstance(source, bytes):
        data = source
    else:
        try:
            with source.open("rb") as file:
                data = file.read(MAX_BYTES + 1)  # no more is taken into memory of a file that is too large
        except OSError as error:
            raise InvalidRequest(name, str(source), f"a file that can be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        found = f"{len(data)} bytes" if isinstance(source, bytes) else f"more than {MAX_BYTES} bytes"
        raise InvalidRequest(name, found, f"at most {MAX_BYTES} bytes", "send a smaller image")
    return data


def _eight_bits(image: Image.Image) -> Image.Image:
    # Pillow's own conversion of sixteen bits clips at 255: almost every pixel would be white.
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
