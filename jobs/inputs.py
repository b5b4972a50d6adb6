"""Pictures that jobs start from, and their masks: checked where they enter, stored by their content, as they came."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from PIL import Image, ImageOps

from jobs.errors import FieldError, InvalidSpec, KeyNotFound, StorageRefused
from jobs.fields import ALLOWED, MAX_SIDE, PICTURES, InputKey
from jobs.picture_files import too_costly
from jobs.spec import JobSpec
from jobs.spec_checks import size_complaints
from jobs.storage import Storage

MAX_BYTES = 20_000_000
MAX_PIXELS = 32_000_000
#: Half of what prune waits (`prune.INPUT_AGE`), so that neither clock need be right to the hour.
RENEWED_AFTER = timedelta(hours=12)
#: Pillow's name of the format, the ending of our key, the content type. No other decoder is ever tried. MPO is what
#: Pillow calls the JPEG of a phone that has a second picture inside (a depth map, a preview): the first one counts.
_FORMATS = {
    "PNG": ("png", "image/png"),
    "JPEG": ("jpg", "image/jpeg"),
    "MPO": ("jpg", "image/jpeg"),
    "WEBP": ("webp", "image/webp"),
}
_DECODERS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that decodes. size: (width, height) as seen, after its EXIF orientation; data: none once stored."""

    key: InputKey
    content_type: str
    size: tuple[int, int]
    data: bytes | None


class Inputs:
    """Stores the pictures of specs; one that many of them name is looked at once."""

    def __init__(self, storage: Callable[[], Storage]) -> None:
        """`storage` is called when a spec has a picture."""
        self._storage = storage
        self._seen: dict[tuple[str, bytes | Path | InputKey], Picture | InvalidSpec] = {}
        self._there: set[InputKey] = set()

    def stored(self, spec: JobSpec) -> JobSpec:
        """The spec with storage keys instead of pictures and paths.

        Raises InvalidSpec for a picture that a worker could not use, StorageError when it cannot be stored.
        """
        if spec.init_image is None:  # then it has no mask either; almost every row of a night ends here
            return spec
        sources = {field: getattr(spec, field) for field in PICTURES if getattr(spec, field) is not None}
        if all(isinstance(source, InputKey) for source in sources.values()):
            for field, key in sources.items():  # looked at when it was stored
                self._check_there(field, key)
            return spec
        pictures = {field: self._picture(field, source) for field, source in sources.items()}
        _check_sizes(spec, {field: picture.size for field, picture in pictures.items()})
        for field, picture in pictures.items():
            self._put(picture)
            self._seen[field, sources[field]] = replace(picture, data=None)
        return spec.model_copy(update={field: picture.key for field, picture in pictures.items()})

    def _check_there(self, field: str, key: InputKey) -> None:
        if key in self._there:
            return
        try:
            if not self._is_young(key):
                content_type = dict(_FORMATS.values()).get(key.rpartition(".")[2], "application/octet-stream")
                self._storage().put(key, self._storage().get(key), content_type)
        except KeyNotFound:
            raise _refused(field, f"{key} is not in the storage; give the picture itself") from None
        self._there.add(key)

    def _is_young(self, key: InputKey) -> bool:
        """Whether it was stored of late. One that was not is stored again: `prune` removes what no job names and what
        is old, and the job that will name this one is not inserted yet. Raises KeyNotFound."""
        return self._storage().look(key).modified > datetime.now(UTC) - RENEWED_AFTER

    def _picture(self, field: str, source: bytes | Path | InputKey) -> Picture:
        found = self._seen.get((field, source)) or self._looked_at(field, source)
        if isinstance(found, InvalidSpec):
            self._seen[field, source] = found
            raise found
        return found

    def _looked_at(self, field: str, source: bytes | Path | InputKey) -> Picture | InvalidSpec:
        try:
            if isinstance(source, InputKey):
                return replace(look_at(field, self._fetched(field, source)), data=None)
            return look_at(field, source if isinstance(source, bytes) else _read(field, source))
        except InvalidSpec as error:
            return error

    def _fetched(self, field: str, key: InputKey) -> bytes:
        self._check_there(field, key)
        try:
            return self._storage().get(key)
        except KeyNotFound:  # removed this very moment
            raise _refused(field, f"{key} is not in the storage; give the picture itself") from None

    def _put(self, picture: Picture) -> None:
        if picture.data is None:
            return
        # Refused: to one who may not list a bucket, S3 answers 403 for what is not there.
        with contextlib.suppress(KeyNotFound, StorageRefused):
            if self._is_young(picture.key):
                return
        self._storage().put(picture.key, picture.data, picture.content_type)


def look_at(field: str, data: bytes) -> Picture:
    """The picture of these bytes. Raises InvalidSpec for what is too large, no picture, or not whole."""
    if len(data) > MAX_BYTES:
        raise _refused(field, f"has {len(data)} bytes; allowed: at most {MAX_BYTES}")
    if reason := too_costly(data):
        raise _refused(field, reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF, thousands in one file: they would drown the log
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_DECODERS) as image:
                _check_header(field, image)
                ending, content_type = _FORMATS[str(image.format)]
                size = ImageOps.exif_transpose(image).size
    except InvalidSpec:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):  # before the header is ours to look at
        raise _refused(field, f"has far more pixels than are allowed: at most {MAX_PIXELS} in all") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise _refused(field, f"cannot be decoded ({type(error).__name__}); allowed: {ALLOWED[field]}") from None
    return Picture(InputKey(f"inputs/{hashlib.sha256(data).hexdigest()}.{ending}"), content_type, size, data)


def _check_header(field: str, image: Image.Image) -> None:
    """From the header alone, before any pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _refused(field, f"has {width} x {height} pixels; allowed: at most {MAX_PIXELS} in all")
    if getattr(image, "n_frames", 1) != 1 and image.format != "MPO":
        raise _refused(field, "is an animation; allowed: one frame")


def _check_sizes(spec: JobSpec, sizes: Mapping[str, tuple[int, int]]) -> None:
    """What depends on the sizes of the pictures: that of a job which gives none, and of what lies on one another."""
    width, height = size = sizes["init_image"]
    # Without a size of its own the job takes the picture's.
    taken = [side for side, own in zip(size, (spec.width, spec.height), strict=True) if own is None]
    if not all(64 <= side <= MAX_SIDE for side in taken):
        raise _refused(
            "init_image", f"has {width} x {height} pixels; allowed: 64 to {MAX_SIDE} a side, or give width and height"
        )
    if sizes.get("mask", size) != size:
        found = "{} x {}".format(*sizes["mask"])
        raise _refused("mask", f"has {found} pixels; allowed: those of its init_image, {width} x {height}")
    found_errors = list(size_complaints(spec, size))
    if found_errors:
        raise InvalidSpec(*found_errors)


def _read(field: str, path: Path) -> bytes:
    try:
        # One byte more than allowed is enough to know that it is too long.
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise _refused(field, f"cannot read {str(path)[:200]!r}: {reason}") from None


def _refused(field: str, message: str) -> InvalidSpec:
    return InvalidSpec(FieldError(field, message))
