"""The fields of a spec, each for itself: its limits, what may stand in it in words, and how it is read."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializerFunctionWrapHandler, WrapSerializer

from jobs.samplers import FAMILIES, our_name

MAX_PROMPT = 2000
MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_IMAGES = 64
MAX_SIDE = 2048
MAX_CLIP_SKIP = 12
MAX_DEEPCACHE_INTERVAL = 20
MAX_TOKEN_MERGING_RATIO = 0.75
#: From this priority on somebody waits for the picture. The broker's uppermost step begins there (`jobs.bell`).
URGENT_PRIORITY = 7
MAX_MASK_BLUR = 256.0
MAX_UPSCALE = 4.0
#: The longest side that a second pass may draw.
MAX_LARGER_SIDE = 4096

_SIDE = f"a multiple of 8 from 64 to {MAX_SIDE}, or none for the init_image's, else the model's own"
_PICTURE = "a PNG, JPEG or WebP picture: its bytes, its path, or its key in the storage"
_ONE_SPACING = ", ".join(family.name for family in FAMILIES if family.scheduler is not None)
_ALL_SPACINGS = ", ".join(family.name for family in FAMILIES if family.scheduler is None)

#: What may stand in each field, in words; every error message quotes it.
ALLOWED: Mapping[str, str] = {
    "prompt": f"text of 1 to {MAX_PROMPT} characters without control characters",
    "negative_prompt": f"text of at most {MAX_PROMPT} characters without control characters",
    "width": _SIDE,
    "height": _SIDE,
    "steps": f"a whole number from 1 to {MAX_STEPS}",
    "guidance": "a number from 0 to 50, or none for unguided",
    "guidance_rescale": "a number from 0 to 1",
    "guidance_start": "a number from 0, below 1",
    "guidance_stop": "a number above 0, at most 1",
    "sampler": f"{_ONE_SPACING}; or, each also with _karras or _exponential: {_ALL_SPACINGS}",
    "deepcache_interval": f"a whole number from 1 to {MAX_DEEPCACHE_INTERVAL}",
    "token_merging_ratio": f"a number from 0 to {MAX_TOKEN_MERGING_RATIO}",
    "decoder": "vae or tiny",
    "eta": "a number from 0 to 1",
    "clip_skip": f"a whole number from 1 to {MAX_CLIP_SKIP}",
    "noise": "cpu or cuda",
    "seed": f"a whole number from 0 to {MAX_SEED}, or none for one drawn at submit",
    "images": f"a whole number from 1 to {MAX_IMAGES}",
    "init_image": _PICTURE,
    "strength": "a number above 0, at most 1",
    "mask": _PICTURE,
    "mask_blur": f"a number from 0 to {MAX_MASK_BLUR:g}",
    "resize": "stretch, crop or fill",
    "upscale": f"a number above 1, at most {MAX_UPSCALE:g}, or none",
    "upscale_strength": "a number above 0, at most 1",
    "upscale_steps": f"a whole number from 1 to {MAX_STEPS}, or none for those of the first pass",
    "upscale_by": "latent or pixel",
    "model": "a name of 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit",
    "priority": "a whole number from 0 to 9 (9 is the most urgent)",
}
#: The fields that hold a picture.
PICTURES = ("init_image", "mask")

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_INPUT_KEY = re.compile(r"inputs/[0-9a-f]{64}\.(png|jpg|webp)")
_BLANKS = str.maketrans("\t\n\r", "   ")


class InputKey(str):
    """The storage key of a picture that is already stored."""

    __slots__ = ()


def _clean_text(text: str) -> str:
    """One line of NFC text. Raises ValueError for control characters: nobody means them, and PostgreSQL refuses NUL."""
    if text.isascii() and text.isprintable():  # almost every prompt, and then nothing is to be cleaned
        return text.strip()
    text = unicodedata.normalize("NFC", text.translate(_BLANKS))
    bad = sorted({f"U+{ord(char):04X}" for char in text if unicodedata.category(char) in ("Cc", "Cs")})
    if bad:
        raise ValueError(f"has control characters ({', '.join(bad)})")
    text = text.strip()
    if len(text) > MAX_PROMPT:
        raise ValueError(f"is longer than {MAX_PROMPT} characters once its letters are composed (NFC)")
    return text


def _clean_prompt(text: str) -> str:
    text = _clean_text(text)
    if not text:
        raise ValueError("is empty")
    return text


def _read_image_source(value: object) -> bytes | Path | InputKey | None:
    """A string of the form of a key is a key, that of a URL is refused; every other string is a path."""
    if isinstance(value, str) and value:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:(//|\\\\)|//|\\\\", value):
            raise ValueError("is a URL; none is ever fetched: give the picture itself")
        return InputKey(value) if _INPUT_KEY.fullmatch(value) else Path(value)
    if value is None or isinstance(value, (bytes, Path)):
        return value
    raise ValueError("is neither bytes, path nor key")


def _write_image_source(value: object, default: SerializerFunctionWrapHandler) -> object:
    return str(value) if isinstance(value, (str, Path)) else default(value)


# One function each, which looks at the length once more itself: pydantic would do that by a call of Python's for each
# constraint that follows a function, and half the time of a bulk file is the validation of its rows.
Text = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_clean_text)]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_clean_prompt)]
Side = Annotated[int, Field(ge=64, le=MAX_SIDE, multiple_of=8)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Share = Annotated[float, Field(gt=0, le=1)]
Sampler = Annotated[str, AfterValidator(our_name)]
ImageSource = Annotated[
    Any, BeforeValidator(_read_image_source), WrapSerializer(_write_image_source, when_used="unless-none")
]
Resize = Literal["stretch", "crop", "fill"]
Upscaling = Literal["latent", "pixel"]
Noise = Literal["cpu", "cuda"]
Decoder = Literal["vae", "tiny"]
