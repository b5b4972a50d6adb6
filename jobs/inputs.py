"""Init images: checked where they enter, stored by their content."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from jobs.errors import FieldError, InvalidSpec
from jobs.spec import ALLOWED, MAX_SIDE, InputKey, JobSpec
from jobs.storage import Storage

MAX_BYTES = 20_000_000
MAX_PIXELS = 32_000_000
#: Pillow's name of the format, the ending of our key, the content type. No other decoder is ever tried.
_FORMATS = {"PNG": ("png", "image/png"), "JPEG": ("jpg", "image/jpeg"), "WEBP": ("webp", "image/webp")}


def store_input(spec: JobSpec, storage: Storage) -> JobSpec:
    """The spec with the storage key of its init image instead of the picture or its path.

    Raises InvalidSpec for a picture that a worker could not use, StorageError when it cannot be stored.
    """
    source = spec.init_image
    if source is None:
        return spec
    if isinstance(source, InputKey):
        if not storage.exists(source):
            raise _refused(f"{source} is not in the storage; give the picture itself")
        return spec
    data = source if isinstance(source, bytes) else _read(source)
    ending, content_type = check_image(data, spec)
    key = InputKey(f"inputs/{hashlib.sha256(data).hexdigest()}.{ending}")
    if not storage.exists(key):
        storage.put(key, data, content_type)
    return spec.model_copy(update={"init_image": key})


class Inputs:
    """Stores the init images of many specs through `store`; a picture that many of them name is looked at once."""

    def __init__(self, store: Callable[[JobSpec], JobSpec]) -> None:
        self._store = store
        self._seen: dict[tuple[bytes | Path | None, bool], JobSpec | InvalidSpec] = {}

    def stored(self, spec: JobSpec) -> JobSpec:
        """The spec with its init image stored. Raises as `store` does."""
        if spec.init_image is None:
            return spec
        # Without a size of its own a job takes the picture's, which then must be in range.
        source = (spec.init_image, None in (spec.width, spec.height))
        if source not in self._seen:
            self._seen[source] = self._outcome(spec)
        found = self._seen[source]
        if isinstance(found, InvalidSpec):
            raise found
        return spec.model_copy(update={"init_image": found.init_image})

    def _outcome(self, spec: JobSpec) -> JobSpec | InvalidSpec:
        try:
            return self._store(spec)
        except InvalidSpec as error:
            return error


def check_image(data: bytes, spec: JobSpec) -> tuple[str, str]:
    """The ending and content type of a picture that really decodes. Raises InvalidSpec."""
    if len(data) > MAX_BYTES:
        raise _refused(f"has {len(data)} bytes; allowed: at most {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=tuple(_FORMATS)) as image:
                _check_size(image, spec)
                image.load()
                return _FORMATS[str(image.format)]
    except InvalidSpec:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise _refused(f"cannot be decoded ({type(error).__name__}); allowed: {ALLOWED['init_image']}") from None


def _check_size(image: Image.Image, spec: JobSpec) -> None:
    """From the header alone, before any pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _refused(f"has {width} x {height} pixels; allowed: at most {MAX_PIXELS} in all")
    if getattr(image, "n_frames", 1) != 1:
        raise _refused("is an animation; allowed: one frame")
    # Without a size of its own the job takes the picture's.
    if None in (spec.width, spec.height) and not (64 <= width <= MAX_SIDE and 64 <= height <= MAX_SIDE):
        raise _refused(f"has {width} x {height} pixels; allowed: 64 to {MAX_SIDE} a side, or give width and height")


def _read(path: Path) -> bytes:
    try:
        # One byte more than allowed is enough to know that it is too long.
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _refused(f"cannot read {str(path)[:200]!r}: {reason}") from None


def _refused(message: str) -> InvalidSpec:
    return InvalidSpec(FieldError("init_image", message))
