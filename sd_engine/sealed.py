"""Arrays and words as bytes that are read back whole or not at all: safetensors, with a digest of all that is in them.

The digest finds damage; it proves no origin. Nothing that is read is executed, and nothing larger than what was asked
for is taken apart.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load, save

from sd_engine.errors import SavedRowUnusable

# Far above any header of ours (a few tensors, a dozen words).
HEADER_LIMIT: Final = 64 * 1024
_DIGEST: Final = "sha256"

Array = npt.NDArray[np.generic]


class Unsealed(NamedTuple):
    """What was sealed."""

    words: dict[str, str]
    arrays: dict[str, Array]


def seal(kind: str, version: int, words: Mapping[str, str], arrays: Mapping[str, Array]) -> bytes:
    """Words and contiguous arrays as bytes."""
    all_words = {**words, "kind": kind, "version": str(version)}
    return save(dict(arrays), metadata={**all_words, _DIGEST: _digest(all_words, arrays)})


def unseal(kind: str, version: int, data: bytes, *, limit: int) -> Unsealed:
    """What `seal` was given. limit: the most bytes of all arrays.

    Raises SavedRowUnusable for bytes that are larger, damaged, or of another kind or version.
    """
    if len(data) > limit + HEADER_LIMIT:
        raise SavedRowUnusable(f"it has {len(data)} bytes, at most {limit + HEADER_LIMIT} are possible")
    try:
        words = _words(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SavedRowUnusable("its header is damaged") from error
    said = words.pop(_DIGEST, None), words.pop("kind", None), words.pop("version", None)
    if said[1:] != (kind, str(version)):
        raise SavedRowUnusable(f"it is {said[1]!r:.40} of version {said[2]!r:.40}, not {kind!r} of version {version}")
    try:
        arrays: dict[str, Array] = load(data)
        digest = _digest({**words, "kind": kind, "version": str(version)}, arrays)
    except Exception as error:  # whatever the library makes of bytes that are no file of it
        raise SavedRowUnusable("its arrays are damaged") from error
    if said[0] != digest:
        raise SavedRowUnusable("it is damaged: its digest is another")
    return Unsealed(words, arrays)


def _words(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, HEADER_LIMIT):
        raise ValueError("the header does not end where it says")
    header: Any = json.loads(data[8 : 8 + length].decode("utf-8"))
    return {str(name): str(value) for name, value in header["__metadata__"].items()}


def _digest(words: Mapping[str, str], arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(words.items())).encode("utf-8"))
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode("utf-8"))
        digest.update(array.tobytes())
    return digest.hexdigest()
