"""Guidance: none, any and rescaled, each as the reference's pipeline has it, in one pack with all others."""

from __future__ import annotations

from dataclasses import replace
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
# The tiny model, untrained, hardly heeds its prompt: so much is needed to see in a picture where it was guided.
STRONG = 100.0
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


def pipelines_interval(pipeline: Any, steps: int, start: int, stop: int) -> np.ndarray:
    """Guidance switched on and off between the steps, as the reference's documentation has it (its dynamic CFG)."""
    prompt, negative = pipeline.encode_prompt("red cat", "cpu", 1, True, negative_prompt="at")
    texts = {True: torch.cat([negative, prompt]), False: prompt}

    def switch(pipeline: Any, step: int, _: object, inputs: dict[str, Any]) -> dict[str, Any]:
        guided = start <= step + 1 < stop
        pipeline._guidance_scale = STRONG if guided else 1.0
        return inputs | {"prompt_embeds": texts[guided]}

    given = {"negative_prompt": "at", "prompt": "red cat"} if start == 0 else {"prompt_embeds": prompt}
    return np.asarray(
        pipeline(
            **given,
            num_inference_steps=steps,
            guidance_scale=STRONG if start == 0 else 1.0,
            callback_on_step_end=switch,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            generator=torch.Generator().manual_seed(9),
            output_type="np",
        ).images[0]
    )


def test_guidance_in_an_interval_draws_the_references_picture_beside_others(model: Model, tiny_folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    whole = Request("red cat", negative_prompt="at", seed=9, steps=5, sampler="ddim", guidance=STRONG)
    intervals = ((0.0, 0.6), (0.4, 1.0), (0.2, 0.8))
    requests = [replace(whole, guidance_start=start, guidance_stop=stop) for start, stop in intervals]
    everywhere, *pictures = Engine(model).render([whole, *requests])
    for picture, (start, stop) in zip(pictures, intervals, strict=True):
        wanted = pipelines_interval(pipeline, 5, int(start * 5), int(stop * 5))
        assert np.abs(picture - wanted * 255).max() <= LEVELS, (start, stop)
        assert np.abs(picture.astype(int) - everywhere).max() > 2 * LEVELS, "nothing was left out"


def test_a_step_without_guidance_takes_one_unet_row_of_the_call(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    forward = model.unet.forward

    def counted(x: torch.Tensor, t: torch.Tensor, context: object) -> torch.Tensor:
        calls.append(len(x))
        return forward(x, t, context)  # type: ignore[arg-type]

    monkeypatch.setattr(model.unet, "forward", counted)
    early = Request("cat", steps=4, guidance_stop=0.5, width=64, height=64)
    late = Request("cat", steps=4, guidance_start=0.75, width=64, height=64)
    Engine(model).render([early, late])
    assert calls == [2 + 1, 2 + 1, 1 + 1, 1 + 2]


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
