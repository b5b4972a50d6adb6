"""What the fields of a spec must be to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jobs.errors import FieldError, shown
from jobs.fields import MAX_LARGER_SIDE, MAX_SEED
from jobs.samplers import our_name

if TYPE_CHECKING:
    from jobs.spec import JobSpec

#: Most pixels x steps x images of one job, both passes together: a typing slip must not occupy a GPU for a day.
MAX_WORK = 2**34
#: The side counted for a job that leaves the size to its model.
ASSUMED_SIDE = 512
_CELL = 8


def _given(value: object) -> bool:
    return value is not None


def _is_ddim(value: object) -> bool:
    try:
        return isinstance(value, str) and our_name(value) == "ddim"
    except ValueError:
        return False


def _guided(value: Any) -> bool:
    try:
        return value is not None and float(value) > 1
    except (TypeError, ValueError, OverflowError):
        return False


@dataclass(frozen=True, slots=True)
class Need:
    """What a field needs to mean anything: that the field `of` has a value for which `met` holds, in words `what`.

    `met` takes written values too. `stand_in`: a written value that meets it and changes least.
    """

    of: str
    what: str
    met: Callable[[Any], bool]
    stand_in: str


_GUIDED = Need("guidance", "a guidance above 1", _guided, "7.5")
_INIT = Need("init_image", "an init_image", _given, "-")
_MASK = Need("mask", "a mask", _given, "-")
_UPSCALE = Need("upscale", "upscale", _given, "1.01")
#: A field stands after the field that it needs.
NEEDS: Mapping[str, Need] = {
    "strength": _INIT,
    "mask": _INIT,
    "mask_blur": _MASK,
    "resize": _INIT,
    "upscale_strength": _UPSCALE,
    "upscale_steps": _UPSCALE,
    "upscale_by": _UPSCALE,
    "guidance_rescale": _GUIDED,
    "guidance_start": _GUIDED,
    "guidance_stop": _GUIDED,
    "eta": Need("sampler", "the sampler ddim", _is_ddim, "ddim"),
}


def idle_fields(fields: Mapping[str, Any]) -> set[str]:
    """The fields that mean nothing, because what they need is not among these; `fields` has every field of a spec."""
    return {field for field, need in NEEDS.items() if not need.met(fields[need.of])}


def with_stand_ins(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The written fields and what they need, so that they can be read for themselves."""
    found = dict(fields)
    for field, need in reversed(list(NEEDS.items())):
        if field in found:
            found.setdefault(need.of, need.stand_in)
    return found


def complaints(spec: JobSpec) -> list[FieldError]:
    """Everything that keeps these fields from going together."""
    return [*_idle(spec), *_interval(spec), *_too_few_steps(spec), *_seed(spec), *size_complaints(spec)]


def _idle(spec: JobSpec) -> Iterator[FieldError]:
    fields, defaults = spec.__dict__, _defaults(type(spec))
    given = spec.model_fields_set
    for field, need in NEEDS.items():
        if field in given and fields[field] != defaults[field] and not need.met(fields[need.of]):
            yield FieldError(field, f"{shown(fields[field])} was given without {need.what}; give both or none")


@cache
def _defaults(kind: type[JobSpec]) -> Mapping[str, object]:
    return {field: kind.model_fields[field].default for field in NEEDS}


def _interval(spec: JobSpec) -> Iterator[FieldError]:
    if not spec.guidance_start < spec.guidance_stop:
        yield FieldError(
            "guidance_stop",
            f"{spec.guidance_stop:g} is not allowed; allowed: above guidance_start, {spec.guidance_start:g}; "
            "guidance none is unguided throughout",
        )


def _too_few_steps(spec: JobSpec) -> Iterator[FieldError]:
    if spec.init_image is not None and spec.strength < 1 / spec.steps:
        yield _no_step("strength", spec.strength, spec.steps)
    if spec.upscale is not None and spec.upscale_strength < 1 / upscale_steps(spec):
        yield _no_step("upscale_strength", spec.upscale_strength, upscale_steps(spec))


def _no_step(field: str, strength: float, steps: int) -> FieldError:
    return FieldError(field, f"{strength} of {steps} steps leaves no step to take; allowed: at least 1/steps")


def _taken(steps: int, strength: float) -> int:
    return max(1, int(steps * strength))  # as the engine does: 49 * (1 / 49) is just below 1


def upscale_steps(spec: JobSpec) -> int:
    """The steps of the second pass before its strength is applied."""
    return spec.steps if spec.upscale_steps is None else spec.upscale_steps


def _seed(spec: JobSpec) -> Iterator[FieldError]:
    if spec.seed is not None and spec.seed + spec.images - 1 > MAX_SEED:
        last = MAX_SEED + 1 - spec.images
        yield FieldError("seed", f"{spec.seed} with {spec.images} images runs past {MAX_SEED}; allowed: 0 to {last}")


def size_complaints(spec: JobSpec, picture: tuple[int, int] | None = None) -> Iterator[FieldError]:
    """What is too large about it. `picture`: (width, height) of its init image, where that is known."""
    own = picture or (ASSUMED_SIDE, ASSUMED_SIDE)
    width, height = (side or other - other % _CELL for side, other in zip((spec.width, spec.height), own, strict=True))
    work = width * height * spec.steps
    if spec.upscale is not None:
        larger = larger_side(width, spec.upscale), larger_side(height, spec.upscale)
        if max(larger) > MAX_LARGER_SIDE:
            yield FieldError(
                "upscale",
                f"{spec.upscale:g} times {width} x {height} is {larger[0]} x {larger[1]} pixels; "
                f"allowed: at most {MAX_LARGER_SIDE} a side",
            )
        work += larger[0] * larger[1] * _taken(upscale_steps(spec), spec.upscale_strength)
    if work * spec.images > MAX_WORK:
        remedy = "split it" if spec.images > 1 else "take fewer steps or draw smaller"
        yield FieldError(
            "images",
            f"{spec.images} images of {spec.steps} steps at this size are {work * spec.images} pixel steps; "
            f"allowed: at most {MAX_WORK} a job; {remedy}",
        )


def larger_side(side: int, times: float) -> int:
    """The side after a second pass that enlarges so many times: a multiple of 8, as the engine has it."""
    return _CELL * int(side * times / _CELL + 0.5)


def first_side(larger: int, times: float) -> int:
    """The side before it; exact, because `times` is above 1."""
    return _CELL * int(larger / times / _CELL + 0.5)
