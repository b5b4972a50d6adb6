"""Guidance: none, any and rescaled, each as the reference's pipeline has it, in one pack with all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from sd_engine import Engine, Model, Request, load_model
from sd_engine.guidance import Spread
from sd_engine.row import Lane, Row
from sd_engine.samplers import step_table
from sd_engine.schedules import NoiseSchedule

# Our float32 sums are taken in another order than the reference's; four steps and the rounding to 256 levels make at
# most two levels of that.
LEVELS = 2
SCALES = ((None, 0.0), (1.0, 0.0), (1.5, 0.0), (7.5, 0.0), (20.0, 0.0), (7.5, 0.7), (20.0, 1.0))


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


def requests() -> list[Request]:
    return [
        Request(
            "red cat",
            negative_prompt="at",
            seed=9,
            steps=4,
            sampler="ddim",
            guidance=guidance,
            guidance_rescale=rescale,
        )
        for guidance, rescale in SCALES
    ]


def test_every_guidance_in_one_pack_draws_the_references_picture(model: Model, tiny_folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    for picture, (guidance, rescale) in zip(Engine(model).render(requests()), SCALES, strict=True):
        wanted = pipeline(
            "red cat",
            negative_prompt="at",
            num_inference_steps=4,
            guidance_scale=guidance or 1.0,
            guidance_rescale=rescale,
            generator=torch.Generator().manual_seed(9),
            output_type="np",
        ).images[0]
        assert np.abs(picture - wanted * 255).max() <= LEVELS, (guidance, rescale)


def row(guidance: float | None, rescale: float = 0.0) -> Row:
    request = Request("x", guidance=guidance, guidance_rescale=rescale, width=64, height=64)
    return Row(1, request, Lane("m", 64, 64), step_table("ddim", NoiseSchedule(), 4))


def test_rescaling_is_the_papers_for_those_who_ask_and_touches_no_bit_of_the_others() -> None:
    rows = [row(7.5), row(7.5, 0.7), row(None), row(7.5, 1.0)]
    prediction = torch.randn((7, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    joined = Spread.of(rows, torch.device("cpu")).join(prediction)
    plain = Spread.of([row(7.5), row(7.5), row(None), row(7.5)], torch.device("cpu")).join(prediction)
    assert torch.equal(joined[0], plain[0]) and torch.equal(joined[2], prediction[4])
    for i, text, phi in ((1, 3, 0.7), (3, 6, 1.0)):
        wanted = rescale_noise_cfg(plain[i : i + 1], prediction[text : text + 1], phi)
        # The same formula in float32: a rounding or two.
        assert torch.allclose(joined[i : i + 1], wanted, rtol=1e-5, atol=1e-6)


def test_a_prediction_without_any_deviation_is_nan_for_who_asks_to_rescale_it_and_nobody_else() -> None:
    rows = [row(7.5), row(7.5, 0.5), row(7.5, 0.5)]
    prediction = torch.zeros(6, 4, 8, 8)
    prediction[2:4] = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    finite = Spread.of(rows, torch.device("cpu")).join(prediction).isfinite().all(dim=(1, 2, 3))
    assert finite.tolist() == [True, True, False]


def test_padding_repeats_the_last_row_and_is_read_by_nobody() -> None:
    rows = [row(7.5), row(None)]
    padded = Spread.of(rows, torch.device("cpu"), at_least=8)
    assert padded.source_U.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    prediction = torch.randn((8, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    disturbed = prediction.clone()
    disturbed[3:] = float("nan")
    assert torch.equal(padded.join(prediction), padded.join(disturbed))
