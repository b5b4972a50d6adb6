"""JobSpec: the validated, frozen description of a render."""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import ErrorDetails

from jobs import samplers
from jobs.errors import FieldError, InvalidSpec, shown
from jobs.fields import (
    ALLOWED,
    MAX_CLIP_SKIP,
    MAX_DEEPCACHE_INTERVAL,
    MAX_IMAGES,
    MAX_MASK_BLUR,
    MAX_SEED,
    MAX_TOKEN_MERGING_RATIO,
    MAX_UPSCALE,
    MODEL_NAME,
    URGENT_PRIORITY,
    Decoder,
    ImageSource,
    InputKey,
    Noise,
    Prompt,
    Resize,
    Sampler,
    Share,
    Side,
    Steps,
    Text,
    Upscaling,
)
from jobs.spec_checks import complaints


class JobSpec(BaseModel):
    """What to render. Frozen; unknown fields are refused. What each field means: `jobs.fields.FIELDS`.

    Image number i of `images` takes the seed `seed + i`. The sampler may be given by the names that A1111 and ComfyUI
    have for it; ours is kept. Raises pydantic's ValidationError, which names every bad field, its value and what is
    allowed; `read_spec` gives the same as InvalidSpec.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    prompt: Prompt
    negative_prompt: Text = ""
    width: Side | None = None
    height: Side | None = None
    steps: Steps = 20
    guidance: Annotated[float, Field(ge=0, le=50)] | None = 7.5
    guidance_rescale: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    guidance_stop: Share = 1.0
    token_merging_ratio: Annotated[float, Field(ge=0, le=MAX_TOKEN_MERGING_RATIO)] = 0.0
    deepcache_interval: Annotated[int, Field(ge=1, le=MAX_DEEPCACHE_INTERVAL)] = 1
    decoder: Decoder = "vae"
    sampler: Sampler = samplers.DEFAULT
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip_skip: Annotated[int, Field(ge=1, le=MAX_CLIP_SKIP)] = 1
    noise: Noise = "cpu"
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    images: Annotated[int, Field(ge=1, le=MAX_IMAGES)] = 1
    init_image: ImageSource = None
    strength: Share = 0.75
    mask: ImageSource = None
    mask_blur: Annotated[float, Field(ge=0, le=MAX_MASK_BLUR)] = 0.0
    resize: Resize = "stretch"
    upscale: Annotated[float, Field(gt=1, le=MAX_UPSCALE)] | None = None
    upscale_strength: Share = 0.5
    upscale_steps: Steps | None = None
    upscale_by: Upscaling = "latent"
    model: Annotated[str, Field(pattern=rf"^{MODEL_NAME}\z")] = "nightshift-mini"
    priority: Annotated[int, Field(ge=0, le=9)] = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> JobSpec:
        found = complaints(self)
        if found:
            raise InvalidSpec(*found)
        return self

    @model_validator(mode="wrap")  # the last of the validators, so that it sees what all of them complain of
    @classmethod
    def _in_our_words(cls, value: object, validate: ModelWrapValidatorHandler[JobSpec]) -> JobSpec:
        try:
            return validate(value)
        except ValidationError as error:
            raise InvalidSpec(*describe_errors(error)) from None

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for it: it is drawn at once, whatever else a worker draws."""
        return self.priority >= URGENT_PRIORITY

    @property
    def input_key(self) -> str | None:
        """The storage key of the init image. Raises InvalidSpec when the picture was not stored yet."""
        return _stored("init_image", self.init_image)

    @property
    def mask_key(self) -> str | None:
        """The storage key of the mask. Raises InvalidSpec when the picture was not stored yet."""
        return _stored("mask", self.mask)

    def with_seed(self, rng: random.Random) -> JobSpec:
        """This spec with a seed: its own, or one drawn from `rng` such that every image's seed stays in range."""
        if self.seed is not None:
            return self
        return self.model_copy(update={"seed": rng.randrange(MAX_SEED + 2 - self.images)})


def _stored(field: str, source: object) -> str | None:
    if source is None or isinstance(source, InputKey):
        return source
    raise InvalidSpec(FieldError(field, "is not stored yet; submit through jobs.Client, which stores it"))


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
    if not details["loc"]:  # no fields at all
        return FieldError("", details["msg"])
    field = str(details["loc"][0])
    if details["type"] == "extra_forbidden":
        return FieldError(field, _unknown_field(field))
    allowed = ALLOWED[field]
    if details["type"] == "missing":
        return FieldError(field, f"is missing; needed: {allowed}")
    if details["type"] == "value_error":
        return FieldError(field, f"{details['msg'].removeprefix('Value error, ')}; allowed: {allowed}")
    return FieldError(field, f"{shown(details['input'])} is not allowed; allowed: {allowed}")


def _unknown_field(field: str) -> str:
    near = difflib.get_close_matches(field, ALLOWED, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(ALLOWED)}"
    return f"unknown field; {hint}"
