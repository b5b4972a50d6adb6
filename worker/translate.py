"""A claimed job to what the engine accepts: one request per image."""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import KeyNotFound, StorageError
from jobs.picture_files import too_costly
from jobs.spec import JobSpec
from jobs.storage import Storage
from sd_engine import InvalidRequest, Request
from sd_engine.pictures import read_mask, read_picture
from worker.reasons import Unusable

#: What a spec and a request call by the same name and mean alike: all that the engine knows. The rest is below.
_SAME = {field.name for field in fields(Request)} - {"seed", "init_image", "mask"}


def to_requests(spec: JobSpec, storage: Storage) -> list[Request]:
    """``spec.images`` requests with the seeds ``spec.seed``, ``spec.seed + 1``, ... .

    Raises ``Unusable`` when a picture cannot be used or the engine's own checks refuse a value, and ``StorageError``
    when the storage does not answer.
    """
    if spec.seed is None:  # submit draws one; a row without it was not written by us
        raise Unusable("seed: none in the stored spec; submit the job again through jobs.Client.")
    same: dict[str, Any] = {name: getattr(spec, name) for name in _SAME}
    try:
        pictures: dict[str, Any] = {
            "init_image": _picture("init_image", spec.input_key, read_picture, storage),
            "mask": _picture("mask", spec.mask_key, read_mask, storage),
        }
        return [Request(**same, **pictures, seed=spec.seed + index) for index in range(spec.images)]
    except InvalidRequest as error:
        raise Unusable(str(error)) from error


def _picture(
    field: str, key: str | None, read: Callable[[bytes, str], NDArray[np.uint8]], storage: Storage
) -> NDArray[np.uint8] | None:
    if key is None:
        return None
    try:
        data = _whole(field, key, storage)
        # Looked at before it was stored, but others may write there too.
        if reason := too_costly(data):
            raise Unusable(f"{field}: {key} {reason}")
        return read(data, field)
    except KeyNotFound as error:
        raise Unusable(f"{field}: {key} is not in the storage. Submit the job again with the picture.") from error


def _whole(field: str, key: str, storage: Storage) -> bytes:
    """The bytes under a key that is named after them. Raises ``StorageError`` when they were cut off on their way: that
    passes, and is not the job's fault."""
    data = storage.get(key)
    if hashlib.sha256(data).hexdigest() == key.rpartition("/")[2].partition(".")[0]:
        return data
    size = storage.look(key).size_bytes
    if size != len(data):
        raise StorageError(f"{field}: {len(data)} bytes of {key} arrived, it has {size}")
    return data
