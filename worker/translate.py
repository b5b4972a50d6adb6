"""A claimed job to what the engine accepts: one request per image."""

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from jobs.errors import KeyNotFound
from jobs.spec import JobSpec
from jobs.storage import Storage
from sd_engine import InvalidRequest, Request
from worker.reasons import Unusable

# An init image only has to cover the largest picture we draw; these bounds keep a small file that decodes to
# gigabytes from taking the worker's memory.
MAX_BYTES = 20 * 2**20
MAX_PIXELS = 32 * 10**6
FORMATS = ("PNG", "JPEG", "WEBP")


def to_requests(spec: JobSpec, storage: Storage) -> list[Request]:
    """``spec.images`` requests with the seeds ``spec.seed``, ``spec.seed + 1``, ... .

    Raises ``Unusable`` when the init image cannot be used or the engine's own checks refuse a value, and
    ``StorageError`` when the storage does not answer.
    """
    if spec.seed is None:  # submit draws one; a row without it was not written by us
        raise Unusable("seed: none in the stored spec; submit the job again through jobs.Client.")
    init = None if spec.input_key is None else read_image(_fetch(storage, spec.input_key))
    try:
        return [
            Request(
                prompt=spec.prompt,
                negative_prompt=spec.negative_prompt,
                seed=spec.seed + index,
                steps=spec.steps,
                guidance=spec.guidance,
                sampler=spec.sampler,
                width=spec.width,
                height=spec.height,
                init_image=init,
                strength=spec.strength,
                model=spec.model,
            )
            for index in range(spec.images)
        ]
    except InvalidRequest as error:
        raise Unusable(str(error)) from error


def _fetch(storage: Storage, key: str) -> bytes:
    try:
        return storage.get(key)
    except KeyNotFound as error:
        raise Unusable(f"init_image: {key} is not in the storage. Submit the job again with the picture.") from error


def read_image(data: bytes) -> NDArray[np.uint8]:
    """RGB pixels ``[H, W, 3]`` of a PNG, JPEG or WebP; raises ``Unusable`` for anything else or anything too large."""
    if len(data) > MAX_BYTES:
        raise Unusable(f"init_image: {len(data)} bytes; allowed are {MAX_BYTES}. Send a smaller image.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Unusable(
                        f"init_image: {image.width} x {image.height} pixels; allowed are {MAX_PIXELS} in all. "
                        "Send a smaller image."
                    )
                return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise Unusable(f"init_image: not one of {', '.join(FORMATS)}. Send one of these.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"init_image: cannot be decoded ({error}). Send a whole, ordinary image file.") from error
