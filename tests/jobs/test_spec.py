"""JobSpec: what is refused, in which words, and that nothing is lost on the way through JSON."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobs.errors import InvalidSpec
from jobs.fields import ALLOWED, MAX_LARGER_SIDE, MAX_PROMPT, MAX_SEED, MAX_STEPS, PICTURES, InputKey
from jobs.spec import JobSpec, describe_errors, read_spec
from jobs.spec_checks import NEEDS, first_side, larger_side
from sd_engine import InvalidRequest, Request
from sd_engine.request import MAX_SIDE
from tests.jobs.specs import specs

KEY = f"inputs/{'0a' * 32}.png"
SPECS = specs() | specs(init_image=KEY) | specs(init_image=KEY, mask=KEY)
#: A spec of version 0.1.0, as its rows have it.
OLD_ROW = (
    '{"prompt":"a red star","negative_prompt":"","width":96,"height":null,"steps":20,"guidance":7.5,'
    f'"sampler":"euler_a_karras","seed":7,"images":2,"init_image":"{KEY}","strength":0.6,'
    '"model":"nightshift-mini","priority":0}'
)


@given(SPECS)
def test_a_spec_survives_json_unchanged(spec: JobSpec) -> None:
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec


def test_a_stored_init_image_survives_json_as_a_key() -> None:
    spec = JobSpec(prompt="a", init_image=KEY, strength=0.5)
    back = JobSpec.model_validate_json(spec.model_dump_json())
    assert back == spec
    assert isinstance(back.init_image, InputKey)
    assert back.input_key == KEY


@given(SPECS, st.integers())
def test_a_drawn_seed_leaves_room_for_every_image(spec: JobSpec, entropy: int) -> None:
    seeded = spec.with_seed(random.Random(entropy))
    assert seeded.seed is not None
    assert 0 <= seeded.seed <= MAX_SEED + 1 - spec.images
    assert spec.seed in (None, seeded.seed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ""),
        ("prompt", "   "),
        ("prompt", "x" * (MAX_PROMPT + 1)),
        ("prompt", "\u0344" * (MAX_PROMPT // 2 + 1)),  # two characters each, once composed
        ("prompt", "nul\0"),
        ("prompt", "escape\x1b[31m"),
        ("prompt", "c1\x85"),
        ("prompt", "\ud800"),
        ("prompt", 5),
        ("negative_prompt", "bell\a"),
        ("width", 63),
        ("width", 100),
        ("height", 2056),
        ("height", 64.5),
        ("steps", 0),
        ("steps", 10**6),
        ("steps", True),
        ("steps", "7"),
        ("guidance", -0.1),
        ("guidance", 50.1),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("sampler", "plums"),
        ("sampler", 3),
        ("guidance_rescale", 1.1),
        ("guidance_start", -0.1),
        ("guidance_stop", 1.1),
        ("deepcache_interval", 0),
        ("token_merging_ratio", 0.8),
        ("decoder", "taesd"),
        ("eta", -0.1),
        ("clip_skip", 0),
        ("clip_skip", 13),
        ("noise", "mps"),
        ("seed", -1),
        ("seed", 2**32),
        ("images", 0),
        ("images", 65),
        ("init_image", 3),
        ("strength", 0),
        ("strength", 1.5),
        ("strength", float("nan")),
        ("mask", 3),
        ("mask_blur", 257),
        ("resize", "cover"),
        ("upscale", 1),
        ("upscale", 4.1),
        ("upscale_strength", 0),
        ("upscale_steps", 0),
        ("upscale_by", "magic"),
        ("model", "../x"),
        ("model", "a/b"),
        ("model", "x\n"),
        ("model", ""),
        ("priority", 10),
        ("priority", -1),
    ],
)
def test_a_bad_value_is_refused_with_field_and_allowed_range(field: str, value: Any) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_spec({"prompt": "x", field: value})
    (error,) = caught.value.errors
    assert error.field == field
    assert ALLOWED[field] in error.message


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"strength": 0.5}, "strength"),
        ({"mask": KEY}, "mask"),
        ({"mask": b"x" * 100}, "mask"),
        ({"mask_blur": 4.0, "init_image": KEY}, "mask_blur"),
        ({"resize": "crop"}, "resize"),
        ({"upscale_strength": 0.7}, "upscale_strength"),
        ({"upscale_steps": 10}, "upscale_steps"),
        ({"upscale_by": "pixel"}, "upscale_by"),
        ({"eta": 0.5}, "eta"),
        ({"eta": 0.5, "sampler": "DDPM"}, "eta"),
        ({"guidance_rescale": 0.5, "guidance": None}, "guidance_rescale"),
        ({"guidance_rescale": 0.5, "guidance": 1.0}, "guidance_rescale"),
        ({"guidance_start": 0.5, "guidance": None}, "guidance_start"),
        ({"guidance_stop": 0.5, "guidance": 1.0}, "guidance_stop"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "guidance_stop"),
        ({"upscale": 2.0, "steps": 1}, "upscale_strength"),
        ({"upscale": 2.0, "upscale_steps": 3, "upscale_strength": 0.3}, "upscale_strength"),
        ({"upscale": 2.5, "width": 2048}, "upscale"),
        ({"images": 64, "steps": 50, "width": 1024, "height": 1024, "upscale": 4.0}, "images"),
        ({"strength": 0.01, "steps": 10, "init_image": KEY}, "strength"),
        ({"seed": MAX_SEED, "images": 2}, "seed"),
        ({"images": 64, "steps": 1000, "width": 2048, "height": 2048}, "images"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec, match=r"allowed|give both") as caught:
        read_spec({"prompt": "x", **fields})
    assert [error.field for error in caught.value.errors] == [field]


def test_too_much_work_is_split_only_where_there_are_images_to_split() -> None:
    large = {"prompt": "x", "steps": 1000, "width": 2048, "height": 2048, "upscale": 2.0, "upscale_strength": 1.0}
    for images, remedy in ((1, "take fewer steps or draw smaller"), (2, "split it")):
        with pytest.raises(InvalidSpec, match=f"a job; {remedy}$"):
            read_spec({**large, "images": images})


def test_one_of_so_many_steps_is_enough() -> None:
    for steps in range(1, MAX_STEPS + 1):
        read_spec({"prompt": "x", "init_image": KEY, "steps": steps, "strength": 1 / steps})
        read_spec({"prompt": "x", "upscale": 2.0, "upscale_steps": steps, "upscale_strength": 1 / steps})


def test_every_bad_field_is_told_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_spec({"steps": 0, "sed": 4, "width": 1})
    assert {error.field for error in caught.value.errors} == {"prompt", "steps", "sed", "width"}
    assert "did you mean seed?" in str(caught.value)


def test_a_megabyte_of_prompt_is_not_repeated_in_the_error() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_spec({"prompt": "x" * 1_000_000})
    assert len(str(caught.value)) < 400


def test_text_is_one_line_of_composed_characters() -> None:
    assert JobSpec(prompt=" a\ncafe\u0301\t ").prompt == "a caf\u00e9"


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        JobSpec(prompt="x").steps = 3


def test_json_numbers_beyond_float_are_refused() -> None:
    with pytest.raises(InvalidSpec):
        read_spec(json.loads('{"prompt": "x", "guidance": 1e309}'))


def test_a_path_is_not_taken_for_a_stored_picture() -> None:
    spec = JobSpec(prompt="x", init_image="inputs/../../etc/passwd")
    assert isinstance(spec.init_image, Path)
    with pytest.raises(InvalidSpec, match="not stored"):
        _ = spec.input_key


def test_written_numbers_are_read_only_when_asked_for() -> None:
    assert read_spec({"prompt": "x", "steps": "7", "guidance": "2.5"}, from_text=True).steps == 7
    with pytest.raises(InvalidSpec):
        read_spec({"prompt": "x", "steps": "7.5"}, from_text=True)


def test_a_spec_made_directly_tells_field_value_and_range_too() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec(prompt="x", steps=0, sampler="plums", promt="y")  # type: ignore[call-arg]
    for words in (
        "steps: 0 is not allowed; allowed: a whole number from 1",
        "sampler: 'plums'",
        "did you mean prompt?",
    ):
        assert words in str(caught.value)


def test_describe_errors_names_each_field_once() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec(prompt="x", steps=0, width=7)
    assert [error.field for error in describe_errors(caught.value)] == ["width", "steps"]


def test_fields_that_contradict_each_other_are_all_told_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_spec({"prompt": "x", "mask_blur": 3.0, "eta": 1.0, "seed": MAX_SEED, "images": 2})
    assert {error.field for error in caught.value.errors} == {"mask_blur", "eta", "seed"}


def test_a_sampler_by_another_name_is_kept_by_ours() -> None:
    assert JobSpec(prompt="x", sampler="DPM++ 2M SDE Karras").sampler == "dpmpp_2m_sde_karras"
    with pytest.raises(InvalidSpec, match="did you mean dpmpp_2m"):
        read_spec({"prompt": "x", "sampler": "dpmpp_2n"})


def test_a_row_of_version_0_1_0_is_read_as_it_was_meant() -> None:
    spec = JobSpec.model_validate_json(OLD_ROW)
    assert (spec.sampler, spec.width, spec.strength, spec.input_key) == ("euler_a_karras", 96, 0.6, KEY)
    told = {"prompt", "width", "sampler", "seed", "images", "init_image", "strength"}
    news = {name: getattr(spec, name) for name in JobSpec.model_fields if name not in told}
    assert news == {name: JobSpec.model_fields[name].default for name in news}


def test_all_that_the_engine_knows_can_be_asked_for() -> None:
    engines = {field.name: field.default for field in dataclasses.fields(Request)}
    ours = {name: info.default for name, info in JobSpec.model_fields.items()}
    assert set(ours) - set(engines) == {"images", "priority"} and set(engines) <= set(ours)
    differ = {"prompt", "seed", "model"}  # without a default; drawn at submit; the shipped model by its name
    assert {name for name in engines if engines[name] != ours[name]} == differ


PROBES: dict[str, list[Any]] = {
    "guidance_rescale": [-0.01, 0, 0.5, 1, 1.01],
    "deepcache_interval": [0, 1, 20, 21, 2.0],
    "token_merging_ratio": [-0.01, 0, 0.75, 0.76],
    "guidance_start": [-0.01, 0, 0.5, 1, 1.01],
    "guidance_stop": [-0.01, 0, 0.5, 1, 1.01],
    "eta": [-0.01, 0, 0.5, 1, 1.01],
    "clip_skip": [0, 1, 2, 12, 13, 1.5],
    "strength": [0, 0.05, 1, 1.01],
    "mask_blur": [-1, 0, 256, 256.5],
    "resize": ["stretch", "crop", "fill", "none", None],
    "upscale": [None, 1, 1.01, 4, 4.01],
    "upscale_strength": [0, 0.05, 1, 1.01],
    "upscale_steps": [None, 0, 2, 1000, 1001],
    "upscale_by": ["latent", "pixel", "none", None],
    "noise": ["cpu", "cuda", "mps", None],
    "steps": [0, 1, 1000, 1001],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in PROBES for value in PROBES[field]])
def test_a_value_is_allowed_exactly_where_the_engine_allows_it(field: str, value: Any) -> None:
    pictures: dict[str, Any] = {"init_image": KEY, "mask": KEY} if field != "steps" else {}
    larger = {"upscale": 2.0} if field.startswith("upscale_") else {}
    common = {"prompt": "x", "sampler": "ddim", **larger, field: value}
    arrays = {name: np.zeros((64, 64, 3) if name == "init_image" else (64, 64), np.uint8) for name in pictures}
    assert _accepts(InvalidSpec, lambda: read_spec({**common, **pictures})) == _accepts(
        InvalidRequest, lambda: Request(**{**common, **arrays})
    )


def _accepts(refusal: type[Exception], make: Callable[[], object]) -> bool:
    try:
        make()
    except refusal:
        return False
    return True


def test_a_second_pass_has_the_engines_size() -> None:
    assert MAX_LARGER_SIDE == MAX_SIDE


@given(st.integers(8, 256).map(lambda n: n * 8), st.floats(1, 4, exclude_min=True))
def test_the_size_before_a_second_pass_is_found_again(side: int, times: float) -> None:
    larger = larger_side(side, times)
    assert first_side(larger, times) == side
    try:
        assert Request("x", upscale=times).larger(side, side) == (larger, larger)
    except InvalidRequest:
        assert larger > MAX_LARGER_SIDE


def test_a_need_stands_before_what_needs_it() -> None:
    fields = list(NEEDS)
    assert all(fields.index(need.of) < fields.index(field) for field, need in NEEDS.items() if need.of in fields)
    assert {"init_image", *NEEDS} > set(PICTURES)
