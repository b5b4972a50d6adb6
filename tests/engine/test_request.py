"""Requests refuse what cannot be drawn, by name; rows count what they cost."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from sd_engine.errors import InvalidRequest
from sd_engine.request import Request
from sd_engine.row import Lane, Row
from sd_engine.samplers import SAMPLERS, step_table
from sd_engine.schedules import NoiseSchedule

PICTURE = np.zeros((64, 72, 3), np.uint8)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "prompt": [None, 7, b"a cat"],
        "negative_prompt": [None, ["a"]],
        "seed": [-1, 2**64, 1.5, True, "1", None],
        "steps": [0, 1001, 20.0, True, None],
        "guidance": [-0.1, 100.1, float("nan"), float("inf"), "7", True],
        "strength": [0, 0.0, 1.01, -1, float("nan"), "1", None],
        "sampler": ["plms", "", None, "DDIM"],
        "width": [0, 56, 100, 4104, 512.0, True, "512"],
        "height": [0, 56, 100, 4104, 512.0, True, "512"],
        "model": [3, b"mini"],
        "guidance_rescale": [-0.1, 1.1, True, None],
        "deepcache_interval": [0, 21, 2.0, True, None],
        "token_merging_ratio": [-0.1, 0.76, "0", None],
        "decoder": ["taesd", "", None],
        "guidance_start": [-0.1, 1, "0", None],
        "guidance_stop": [-0.1, 0, 1.1, True, None],
        "eta": [-0.1, 1.1, "0", None],
        "clip_skip": [0, 13, 1.0, True, None],
        "mask": [PICTURE[..., 0]],  # of no picture
        "mask_blur": [-1, 257, float("nan"), None],
        "resize": ["", "cover", None],
        "upscale": [1, 1.0, 0.5, 4.1, float("inf"), "2", True],
        "upscale_strength": [0, 1.1, None],
        "upscale_steps": [0, 1001, 2.0, True],
        "upscale_by": ["", "image", None],
        "noise": ["", "mps", None],
        "init_image": [[[1]], "a.png", PICTURE.astype(np.float32), PICTURE[..., :2], PICTURE[0], PICTURE[:0]],
    }.items(),
)
def test_a_bad_value_is_refused_by_field_value_and_range(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequest) as refused:
            Request(**{"prompt": "a cat", field: value})
        assert refused.value.field == field
        assert str(refused.value).startswith(f"{field}=")
        assert " is not allowed: " in str(refused.value)
        assert refused.value.allowed


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "prompt": ["", "猫"],
        "seed": [0, 2**64 - 1],
        "steps": [1, 1000],
        "guidance": [None, 0, 1, 100.0],
        "strength": [1, 1e-300, 0.5],
        "sampler": list(SAMPLERS),
        "width": [None, 64, 4096],
        "height": [None, 64, 4096],
        "model": [None, "mini"],
        "guidance_rescale": [0, 1],
        "guidance_start": [0, 0.999],
        "token_merging_ratio": [0, 0.75],
        "decoder": ["vae", "tiny"],
        "deepcache_interval": [1, 20],
        "guidance_stop": [0.001, 1],
        "eta": [0, 1.0],
        "clip_skip": [1, 12],
        "mask_blur": [0, 256],
        "resize": ["stretch", "crop", "fill"],
        "upscale": [None, 1.001, 4],
        "upscale_strength": [0.001, 1],
        "upscale_steps": [None, 1, 1000],
        "upscale_by": ["latent", "pixel"],
        "noise": ["cpu", "cuda"],
    }.items(),
)
def test_the_ends_of_each_range_are_allowed(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(Request(**{"prompt": "a cat", field: value}), field) == value


@pytest.mark.parametrize("mask", [PICTURE, PICTURE[..., 0].astype(bool), PICTURE[..., 0].tolist()])
def test_what_is_no_mask_is_refused(mask: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^mask=.* is not allowed: .*uint8 \[H, W\]"):
        Request("a cat", init_image=PICTURE, mask=mask)


def test_a_mask_of_another_size_than_its_picture_is_refused_naming_both() -> None:
    with pytest.raises(InvalidRequest, match=r"mask.size=\(72, 64\) .* height and width, \(64, 72\); draw the mask"):
        Request("a cat", init_image=PICTURE, mask=PICTURE[..., 0].T)
    assert Request("a cat", init_image=PICTURE, mask=PICTURE[..., 0]).mask is not None


def test_a_request_is_frozen_and_keeps_its_own_copy_of_the_picture() -> None:
    mine = PICTURE.copy()
    request = Request("a cat", init_image=mine)
    mine[:] = 255
    assert request.init_image is not None
    assert request.init_image.max() == 0
    assert not request.init_image.flags.writeable
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1  # type: ignore[misc]


def test_only_the_prompt_may_be_positional() -> None:
    with pytest.raises(TypeError):
        Request("a cat", "a dog")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("wanted", "fields"),
    [
        ((128, 96), {}),
        ((128, 256), {"width": 256}),
        ((64, 72), {"init_image": PICTURE}),
        ((64, 72), {"init_image": np.zeros((71, 79, 3), np.uint8)}),
        ((512, 72), {"init_image": PICTURE, "height": 512}),
        ((64, 64), {"init_image": PICTURE[:3, :3], "height": 64, "width": 64}),
    ],
)
def test_size_is_as_asked_else_the_pictures_else_the_models(wanted: tuple[int, int], fields: dict[str, Any]) -> None:
    assert Request("a cat", **fields).size(128, 96) == wanted


def test_a_picture_too_small_to_draw_on_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match="give width and height"):
        Request("a cat", init_image=PICTURE[:63])


@pytest.mark.parametrize(("guidance", "unet_rows"), [(None, 1), (0, 1), (1.0, 1), (1.01, 2), (7.5, 2)])
def test_a_guided_row_takes_two_unet_rows(guidance: float | None, unet_rows: int) -> None:
    table = step_table("ddim", NoiseSchedule(), 3)
    row = Row(1, Request("a cat", guidance=guidance), Lane("mini", 64, 128), table)
    assert (row.guided, row.unet_rows, row.units) == (unet_rows == 2, unet_rows, unet_rows * 8 * 16)


def test_a_row_takes_two_unet_rows_where_its_guidance_is_and_one_before_and_after() -> None:
    request = Request("a cat", guidance_start=0.25, guidance_stop=0.8)
    row = Row(1, request, Lane("mini", 64, 64), step_table("ddim", NoiseSchedule(), 8))
    seen = []
    while not row.done:
        seen.append((row.unet_rows, row.most_units // 64))
        row.step += 1
    # int(0.25 * 8) = 2 and int(0.8 * 8) = 6, as the reference's guiders round.
    assert seen == [(1, 2)] * 2 + [(2, 2)] * 4 + [(1, 1)] * 2


def test_guidance_that_stops_before_it_starts_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match=r"guidance_stop=0.3 .* above guidance_start, 0.5; guidance=None is"):
        Request("a cat", guidance_start=0.5, guidance_stop=0.3)
    assert Request("a cat", guidance_start=0.5, guidance_stop=0.55).guided_steps(10) == range(5, 5)


def test_a_row_is_done_after_its_last_line_and_leaves_when_done_cancelled_or_failed() -> None:
    row = Row(1, Request("a cat"), Lane("mini", 64, 64), step_table("ddim", NoiseSchedule(), 3))
    assert not row.done and not row.leaving
    row.step = 3
    assert row.done and row.leaving
    row.step, row.cancelled = 1, True
    assert not row.done and row.leaving
    row.cancelled, row.error = False, ArithmeticError("NaN")
    assert row.leaving


def test_a_refusal_crosses_a_process_boundary() -> None:
    refused = InvalidRequest("steps", 0, "1 to 1000", "take more")
    again = pickle.loads(pickle.dumps(refused))  # noqa: S301 (our own bytes)
    assert (str(again), again.field, again.value) == (str(refused), "steps", 0)
