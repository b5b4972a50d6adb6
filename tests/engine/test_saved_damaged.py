"""Bytes that no row can go on from are refused by one clear error, before they cost anything; the engine goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_engine import Engine, Model, Request, SavedRowUnusable, load_model, sealed
from sd_engine import saved as saved_module
from sd_engine.sealed import Unsealed, seal, unseal
from tests.engine.test_packing import INIT
from tests.tiny_model import make_tiny_model

REQUEST = Request("red cat", seed=4, steps=6, sampler="dpmpp_2m", guidance=2.0, width=64, height=64)
TWO_PASSES = replace(REQUEST, upscale=1.5)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


def after(model: Model, request: Request, steps: int) -> bytes:
    engine = Engine(model)
    id = engine.add(request)
    for _ in range(steps):
        engine.step()
    return engine.save(id)


@pytest.fixture(scope="module")
def good(model: Model) -> bytes:
    return after(model, REQUEST, 3)


def refusal(model: Model, data: bytes, request: Request = REQUEST) -> str:
    """Why the bytes are refused, in a sentence; nothing of the request stays in the engine."""
    engine = Engine(model)
    with pytest.raises(SavedRowUnusable) as caught:
        engine.add(request, data)
    assert engine.idle and engine.step() == []
    message = str(caught.value)
    assert message.startswith("the saved row cannot be used: ") and "\n" not in message and len(message) < 200
    return message


def test_the_good_bytes_of_these_tests_are_good(model: Model, good: bytes) -> None:
    engine = Engine(model)
    assert engine.progress(engine.add(REQUEST, good)) == (3, 6)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_seen(model: Model, good: bytes, data: st.DataObject) -> None:
    place = data.draw(st.one_of(st.integers(0, 1200), st.integers(0, len(good) - 1)))
    changed = bytearray(good)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    refusal(model, bytes(changed))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bytes_that_end_early_are_seen_and_so_are_some_too_many(model: Model, good: bytes, data: st.DataObject) -> None:
    refusal(model, good[: data.draw(st.integers(1, len(good) - 1))])
    refusal(model, good + b"\0" * data.draw(st.integers(1, 9)))


@settings(max_examples=60, deadline=None)
@given(rubbish=st.binary(min_size=1, max_size=400))
def test_rubbish_is_refused(model: Model, rubbish: bytes) -> None:
    refusal(model, rubbish)


def headed(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


HOSTILE = {
    "a header longer than memory": headed(b"{}", 2**63),
    "a header of nothing": headed(b""),
    "no words": headed(b"{}"),
    "words that are a list": headed(b'{"__metadata__": [1]}'),
    "a header that is a number": headed(b"7"),
    "brackets without end": headed(b"[" * 60_000),
    "no text": headed(b"\xff" * 40),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_refused(model: Model, name: str) -> None:
    refusal(model, HOSTILE[name])


def test_more_bytes_than_any_such_row_has_are_refused_before_they_are_looked_at(
    model: Model, good: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "load", lambda data: pytest.fail("it was read"))
    assert "at most" in refusal(model, good + bytes(2**20))


def test_a_shape_beyond_memory_is_refused(model: Model, good: bytes) -> None:
    """The header is well formed and claims an array of petabytes."""
    length = int.from_bytes(good[:8], "little")
    header: dict[str, Any] = json.loads(good[8 : 8 + length])
    for shape in ([2**50, 1, 8, 8], [0, 2**62, 2**62, 4], [-1, 4, 8, 8]):
        header["state"]["shape"] = shape
        refusal(model, headed(json.dumps(header).encode()) + good[8 + length :])


def unsealed(data: bytes) -> Unsealed:
    return unseal(saved_module.KIND, saved_module.VERSION, data, limit=10**6)


def sealed_again(data: bytes, change: Callable[[Unsealed], object]) -> bytes:
    """Bytes with a right digest whose content was changed: what somebody would write who knows the format."""
    whole = unsealed(data)
    change(whole)
    return seal(saved_module.KIND, saved_module.VERSION, whole.words, whole.arrays)


CHANGES: dict[str, Callable[[Unsealed], object]] = {
    "a step beyond the end": lambda it: it.words.update(step="6"),
    "a step before the start": lambda it: it.words.update(step="-1"),
    "a step that is no number": lambda it: it.words.update(step="\u0663"),
    "a pass that is not there": lambda it: it.words.update({"pass": "second"}),
    "no step": lambda it: it.words.pop("step"),
    "a latent of another size": lambda it: it.arrays.update(state=np.zeros((2, 4, 8, 9), np.float32)),
    "a slot too many": lambda it: it.arrays.update(state=np.zeros((3, 4, 8, 8), np.float32)),
    "doubles": lambda it: it.arrays.update(state=np.zeros((2, 4, 8, 8), np.float64)),
    "no latent": lambda it: it.arrays.pop("state"),
    "no noise": lambda it: it.arrays.pop("noise"),
    "noise that is none": lambda it: it.arrays.update(noise=np.full(5056, 255, np.uint8)),
    "noise of another source": lambda it: it.arrays.update(noise=np.zeros(8, np.uint8)),
    "an array too many": lambda it: it.arrays.update(more=np.zeros(1, np.float32)),
    "a first pass of a row of one": lambda it: it.arrays.update(first_pass=np.zeros((4, 8, 8), np.float32)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_fits_no_such_row_is_refused_though_its_digest_is_right(model: Model, good: bytes, name: str) -> None:
    refusal(model, sealed_again(good, CHANGES[name]))


def test_a_second_pass_without_its_first_is_refused(model: Model) -> None:
    later = after(model, TWO_PASSES, 8)
    for name in ("first_pass", "began"):
        refusal(model, sealed_again(later, lambda it, name=name: it.arrays.pop(name)), TWO_PASSES)  # type: ignore[misc]


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, seed=5),
        replace(REQUEST, prompt="red cats"),
        replace(REQUEST, steps=7),
        replace(REQUEST, sampler="euler"),
        replace(REQUEST, width=72),
        replace(REQUEST, noise="cuda"),
        replace(REQUEST, init_image=INIT),
        TWO_PASSES,
    ],
)
def test_another_request_does_not_go_on_with_it(model: Model, good: bytes, other: Request) -> None:
    assert "another request" in refusal(model, good, other)


def test_an_init_image_of_one_other_pixel_is_another_request(model: Model) -> None:
    asked = replace(REQUEST, init_image=INIT)
    changed = INIT.copy()
    changed[3, 4, 1] ^= 1
    assert "another request" in refusal(model, after(model, asked, 2), replace(asked, init_image=changed))


def test_another_model_of_the_same_name_does_not_go_on_with_it(good: bytes, tmp_path: Path) -> None:
    other = load_model(make_tiny_model(tmp_path / "tiny", seed=9))
    assert "another model" in refusal(other, good)


def test_another_step_table_does_not_go_on_with_it(model: Model, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_module, "table_fingerprint", lambda table: "as a later release computes it")
    assert "another table" in refusal(model, good)


def test_another_version_is_refused(model: Model, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_module, "VERSION", saved_module.VERSION + 1)
    assert "version" in refusal(model, good)
