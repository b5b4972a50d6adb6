"""The PNG that leaves the worker."""

import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.spec import JobSpec
from jobs.spec_checks import larger_side
from worker.encode import encode, parameters_text

KEY = f"inputs/{'0a' * 32}.png"


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


@pytest.mark.parametrize(
    "spec",
    [
        JobSpec(prompt="a 星 star", negative_prompt="blur", guidance=None, steps=9, seed=3, images=2, priority=4),
        JobSpec(prompt="a", seed=3, init_image=KEY, mask=KEY, mask_blur=2.0, resize="crop", clip_skip=2),
        JobSpec(prompt="a", seed=3, guidance_start=0.25, guidance_stop=0.75, deepcache_interval=3),
        JobSpec(prompt="a", seed=3, sampler="ddim", eta=0.5, upscale=1.7, upscale_steps=7, noise="cuda"),
    ],
)
def test_the_nightshift_chunk_repeats_the_job_so_that_it_can_be_drawn_again(spec: JobSpec) -> None:
    times = spec.upscale or 1.0
    pixels = noise(larger_side(64, times), larger_side(96, times))
    facts = json.loads(opened(encode(pixels, spec, seed=4).data).info["nightshift"])
    assert (facts["seed"], facts["width"], facts["height"]) == (4, 96, 64)
    assert facts["prompt"] == spec.prompt and ("init_image" in facts) == (spec.init_image is not None)
    again = JobSpec.model_validate(facts)
    own = {name: getattr(spec, name) for name in ("seed", "width", "height", "images", "priority")}
    assert again.model_copy(update=own) == spec


def test_the_parameters_chunk_has_the_widely_read_form() -> None:
    spec = JobSpec(prompt="a red star", negative_prompt="blur", sampler="euler_a", guidance=7.5, steps=20)
    assert parameters_text(spec, 42, 96, 64) == (
        "a red star\n"
        "Negative prompt: blur\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 96x64, Model: nightshift-mini, RNG: CPU"
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sampler": "dpmpp_3m_sde_exponential", "clip_skip": 2}, "Sampler: DPM++ 3M SDE Exponential"),
        ({"clip_skip": 2, "noise": "cuda"}, "Clip skip: 2, RNG: NV"),
        ({"sampler": "ddim", "eta": 0.5, "guidance_rescale": 0.7}, "RNG: CPU, Eta DDIM: 0.5, CFG rescale: 0.7"),
        ({"guidance_start": 0.1, "guidance_stop": 0.7}, "RNG: CPU, Skip Early CFG: 0.1, CFG stop: 0.7"),
        ({"deepcache_interval": 3}, "RNG: CPU, DeepCache interval: 3"),
        ({"token_merging_ratio": 0.5}, "RNG: CPU, Token merging ratio: 0.5"),
        ({"decoder": "tiny"}, "RNG: CPU, VAE Decoder: TAESD"),
        ({"init_image": KEY, "mask": KEY, "mask_blur": 4.0}, "Denoising strength: 0.75, RNG: CPU, Mask blur: 4"),
        (
            {"upscale": 2.0, "upscale_steps": 9},
            "Denoising strength: 0.5, RNG: CPU, Hires upscale: 2, Hires steps: 9, Hires upscaler: Latent",
        ),
        (
            {"upscale": 1.5, "upscale_by": "pixel", "init_image": KEY},
            "Denoising strength: 0.75, RNG: CPU, Hires upscale: 1.5, Hires upscaler: Lanczos, Hires strength: 0.5",
        ),
    ],
)
def test_what_else_was_asked_for_has_the_widely_read_labels(fields: dict[str, Any], text: str) -> None:
    assert text in parameters_text(JobSpec(prompt="x", **fields), 1, 96, 64)


def test_the_same_picture_has_the_same_bytes() -> None:
    spec = JobSpec(prompt="a star")
    assert encode(noise(), spec, 1) == encode(noise(), spec, 1)
