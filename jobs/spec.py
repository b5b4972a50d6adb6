"""JobSpec: the validated, frozen description of a render."""

from __future__ import annotations

import difflib
import random
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    WrapSerializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from jobs.errors import FieldError, InvalidSpec

Sampler = Literal["ddpm", "ddim", "euler", "euler_a", "dpmpp_2m", "euler_karras", "euler_a_karras", "dpmpp_2m_karras"]
#: The engine's sampler names; repeated here because a producer has no engine. A test holds the two equal.
SAMPLERS: tuple[str, ...] = get_args(Sampler)

MAX_PROMPT = 2000
MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_IMAGES = 64
MAX_SIDE = 2048
DEFAULT_STRENGTH = 0.75
#: Most pixels x steps x images of one job: a typing slip must not occupy a GPU for a day.
MAX_WORK = 2**34
#: The side counted for a job that leaves the size to its model.
ASSUMED_SIDE = 512

#: What may stand in each field, in words; every error message quotes it.
ALLOWED: Mapping[str, str] = {
    "prompt": f"text of 1 to {MAX_PROMPT} characters without control characters",
    "negative_prompt": f"text of at most {MAX_PROMPT} characters without control characters",
    "width": f"a multiple of 8 from 64 to {MAX_SIDE}, or none for the model's own",
    "height": f"a multiple of 8 from 64 to {MAX_SIDE}, or none for the model's own",
    "steps": f"a whole number from 1 to {MAX_STEPS}",
    "guidance": "a number from 0 to 50, or none for unguided",
    "sampler": "one of " + ", ".join(SAMPLERS),
    "seed": f"a whole number from 0 to {MAX_SEED}, or none for one drawn at submit",
    "images": f"a whole number from 1 to {MAX_IMAGES}",
    "init_image": "a PNG, JPEG or WebP picture: its bytes, its path, or a key inputs/<sha256>.<png|jpg|webp>",
    "strength": "a number above 0, at most 1",
    "model": "a name of 1 to 64 letters, digits, dots, dashes and underscores, beginning with a letter or digit",
    "priority": "a whole number from 0 to 9 (9 is the most urgent)",
}

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_INPUT_KEY = re.compile(r"inputs/[0-9a-f]{64}\.(png|jpg|webp)")
_BLANKS = str.maketrans("\t\n\r", "   ")


class InputKey(str):
    """The storage key of an init image that is already stored."""

    __slots__ = ()


def _clean_text(text: str) -> str:
    """One line of NFC text. Raises ValueError for control characters: nobody means them, and PostgreSQL refuses NUL."""
    text = unicodedata.normalize("NFC", text.translate(_BLANKS))
    if not text.isprintable():  # a cheap first look: almost every prompt ends here
        bad = sorted({f"U+{ord(char):04X}" for char in text if unicodedata.category(char) in ("Cc", "Cs")})
        if bad:
            raise ValueError(f"has control characters ({', '.join(bad)})")
    return text.strip()


def _nonempty(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def _read_image_source(value: object) -> bytes | Path | InputKey | None:
    """A string of the form of a key is a key; every other string is a path."""
    if isinstance(value, str) and value:
        return InputKey(value) if _INPUT_KEY.fullmatch(value) else Path(value)
    if value is None or isinstance(value, (bytes, Path)):
        return value
    raise ValueError("is neither bytes, path nor key")


def _write_image_source(value: object, default: SerializerFunctionWrapHandler) -> object:
    return str(value) if isinstance(value, (str, Path)) else default(value)


Text = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_clean_text), Field(max_length=MAX_PROMPT)]
Side = Annotated[int, Field(ge=64, le=MAX_SIDE, multiple_of=8)]
ImageSource = Annotated[Any, BeforeValidator(_read_image_source), WrapSerializer(_write_image_source)]


class JobSpec(BaseModel):
    """What to render. Frozen; unknown fields are refused.

    Image number i of `images` takes the seed `seed + i`. Raises pydantic's ValidationError, which names every bad
    field, its value and what is allowed; `read_spec` gives the same as InvalidSpec.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    prompt: Annotated[Text, AfterValidator(_nonempty)]
    negative_prompt: Text = ""
    width: Side | None = None
    height: Side | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 20
    guidance: Annotated[float, Field(ge=0, le=50)] | None = 7.5
    sampler: Sampler = "dpmpp_2m_karras"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    init_image: ImageSource = None
    strength: Annotated[float, Field(gt=0, le=1)] = DEFAULT_STRENGTH
    model: Annotated[str, Field(pattern=rf"^{MODEL_NAME}\z")] = "nightshift-mini"
    priority: Annotated[int, Field(ge=0, le=9)] = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> JobSpec:
        for complaint in (_strength_complaint(self), _seed_complaint(self), _work_complaint(self)):
            if complaint:
                raise ValueError(complaint)
        return self

    @model_validator(mode="wrap")  # the last of the validators, so that it sees what all of them complain of
    @classmethod
    def _in_our_words(cls, value: object, validate: ModelWrapValidatorHandler[JobSpec]) -> JobSpec:
        try:
            return validate(value)
        except ValidationError as error:
            raise InvalidSpec(*describe_errors(error)) from None

    @property
    def input_key(self) -> str | None:
        """The storage key of the init image. Raises InvalidSpec when the picture was not stored yet."""
        if self.init_image is None or isinstance(self.init_image, InputKey):
            return self.init_image
        raise InvalidSpec(FieldError("init_image", "is not stored yet; submit through jobs.Client, which stores it"))

    def with_seed(self, rng: random.Random) -> JobSpec:
        """This spec with a seed: its own, or one drawn from `rng` such that every image's seed stays in range."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": rng.randrange(MAX_SEED + 2 - self.images)})


def _strength_complaint(spec: JobSpec) -> str | None:
    if spec.init_image is None:
        if spec.strength != DEFAULT_STRENGTH:
            return f"strength: {spec.strength} was given without an init_image; give both or none"
        return None
    if int(spec.steps * spec.strength) < 1:
        return f"strength: {spec.strength} of {spec.steps} steps leaves no step to take; allowed: at least 1/steps"
    return None


def _seed_complaint(spec: JobSpec) -> str | None:
    if spec.seed is not None and spec.seed + spec.images - 1 > MAX_SEED:
        last = MAX_SEED + 1 - spec.images
        return f"seed: {spec.seed} with {spec.images} images runs past {MAX_SEED}; allowed: 0 to {last}"
    return None


def _work_complaint(spec: JobSpec) -> str | None:
    work = (spec.width or ASSUMED_SIDE) * (spec.height or ASSUMED_SIDE) * spec.steps * spec.images
    if work > MAX_WORK:
        return (
            f"images: {spec.images} images of {spec.steps} steps at this size are {work} pixel steps; "
            f"allowed: at most {MAX_WORK} a job; split it"
        )
    return None


def read_spec(fields: Mapping[str, object], *, from_text: bool = False) -> JobSpec:
    """The spec of these fields; `from_text` reads numbers from their written form, as a csv file has them.

    Raises InvalidSpec with one entry per bad field.
    """
    try:
        return JobSpec.model_validate(fields, strict=not from_text)
    except ValidationError as error:
        raise InvalidSpec(*describe_errors(error)) from None


def describe_errors(error: ValidationError) -> tuple[FieldError, ...]:
    """One entry per bad field: the field, the value that came and what is allowed."""
    found: dict[str, FieldError] = {}
    for details in error.errors(include_url=False):
        told = details.get("ctx", {}).get("error")
        for one in told.errors if isinstance(told, InvalidSpec) else (_describe(details),):
            found.setdefault(one.field or one.message, one)
    return tuple(found.values())


def _describe(details: ErrorDetails) -> FieldError:
    if not details["loc"]:  # a check of several fields together: its message begins with the field
        field, _, message = details["msg"].removeprefix("Value error, ").partition(": ")
        return FieldError(field, message) if message else FieldError("", details["msg"])
    field = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        return FieldError(field, _unknown_field(field))
    allowed = ALLOWED[field]
    if details["type"] == "missing":
        return FieldError(field, f"is missing; needed: {allowed}")
    if details["type"] == "value_error":
        return FieldError(field, f"{details['msg'].removeprefix('Value error, ')}; allowed: {allowed}")
    return FieldError(field, f"{_shown(details['input'])} is not allowed; allowed: {allowed}")


def _unknown_field(field: str) -> str:
    near = difflib.get_close_matches(field, ALLOWED, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(ALLOWED)}"
    return f"unknown field; {hint}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
