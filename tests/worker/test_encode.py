"""The PNG that leaves the worker."""

import hashlib
import io
import json

import numpy as np
from PIL import Image

from jobs.spec import JobSpec
from worker.encode import encode, parameters_text


def noise(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_pixels_survive_and_the_row_facts_are_right() -> None:
    pixels = noise()
    picture = encode(pixels, JobSpec(prompt="a star"), seed=7)
    np.testing.assert_array_equal(np.asarray(opened(picture.data)), pixels)
    assert (picture.width, picture.height, picture.seed) == (96, 64, 7)
    assert picture.sha256 == hashlib.sha256(picture.data).hexdigest()


def test_the_nightshift_chunk_repeats_the_job_so_that_it_can_be_drawn_again() -> None:
    spec = JobSpec(prompt="a 星 star", negative_prompt="blur", guidance=None, steps=9, seed=3, images=2, priority=4)
    text = opened(encode(noise(), spec, seed=4).data).info["nightshift"]
    facts = json.loads(text)
    assert facts["prompt"] == "a 星 star"
    assert (facts["seed"], facts["steps"], facts["guidance"], facts["width"], facts["height"]) == (4, 9, None, 96, 64)
    del facts["seed"], facts["width"], facts["height"]
    again = JobSpec.model_validate(facts)
    assert again.model_copy(update={"seed": 3, "images": 2, "priority": 4}) == spec


def test_the_parameters_chunk_has_the_widely_read_form() -> None:
    spec = JobSpec(prompt="a red star", negative_prompt="blur", sampler="euler_a", guidance=7.5, steps=20)
    assert parameters_text(spec, 42, 96, 64) == (
        "a red star\n"
        "Negative prompt: blur\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 96x64, Model: nightshift-mini"
    )


def test_the_same_picture_has_the_same_bytes() -> None:
    spec = JobSpec(prompt="a star")
    assert encode(noise(), spec, 1) == encode(noise(), spec, 1)
