"""JobSpec: what is refused, in which words, and that nothing is lost on the way through JSON."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import sd_engine
from jobs.errors import InvalidSpec
from jobs.spec import ALLOWED, MAX_PROMPT, MAX_SEED, SAMPLERS, InputKey, JobSpec, describe_errors, read_spec

KEY = f"inputs/{'0a' * 32}.png"
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=80).filter(
    lambda text: text.strip()
)
SPECS = st.builds(
    JobSpec,
    prompt=TEXT,
    negative_prompt=TEXT | st.just(""),
    width=st.none() | st.integers(8, 256).map(lambda n: n * 8),
    height=st.none() | st.integers(8, 256).map(lambda n: n * 8),
    steps=st.integers(1, 60),
    guidance=st.none() | st.floats(0, 50),
    sampler=st.sampled_from(SAMPLERS),
    seed=st.none() | st.integers(0, MAX_SEED - 3),
    images=st.integers(1, 4),
    model=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    priority=st.integers(0, 9),
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
        ("sampler", "plms"),
        ("seed", -1),
        ("seed", 2**32),
        ("images", 0),
        ("images", 65),
        ("init_image", 3),
        ("strength", 0),
        ("strength", 1.5),
        ("strength", float("nan")),
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
        ({"strength": 0.01, "steps": 10, "init_image": KEY}, "strength"),
        ({"seed": MAX_SEED, "images": 2}, "seed"),
        ({"images": 64, "steps": 1000, "width": 2048, "height": 2048}, "images"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec, match=r"allowed|both") as caught:
        read_spec({"prompt": "x", **fields})
    assert [error.field for error in caught.value.errors] == [field]


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
        JobSpec(prompt="x", steps=0, sampler="plms", promt="y")  # type: ignore[call-arg, arg-type]
    for words in ("steps: 0 is not allowed; allowed: a whole number from 1", "sampler: 'plms'", "did you mean prompt?"):
        assert words in str(caught.value)


def test_describe_errors_names_each_field_once() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec(prompt="x", steps=0, width=7)
    assert [error.field for error in describe_errors(caught.value)] == ["width", "steps"]


def test_the_sampler_names_are_the_engines() -> None:
    assert tuple(sd_engine.SAMPLERS) == SAMPLERS
