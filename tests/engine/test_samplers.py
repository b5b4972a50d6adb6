"""Each sampler's table, driven step by step beside the reference's scheduler object of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)

from sd_engine.errors import InvalidRequest
from sd_engine.samplers import SAMPLERS, Col, StepTable, step_table
from sd_engine.schedules import NoiseSchedule

# diffusers 0.42 turns its sigmas into numpy in a way that numpy 2 warns of; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# What the file of a Stable Diffusion 1.5 folder says: no spacing, so each reference class takes its own default.
SD15_FILE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
MINI = SD15_FILE | {"beta_end": 0.03, "steps_offset": 0, "timestep_spacing": "trailing"}
CONFIGS = {
    "sd15 leading": SD15_FILE | {"timestep_spacing": "leading"},
    "sd15 linspace": SD15_FILE | {"timestep_spacing": "linspace"},
    "sd15 spacing not named": SD15_FILE,
    "mini trailing": MINI,
}
OTHER_BETAS = {
    "linear": MINI | {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "set_alpha_to_one": True},
    "cosine": MINI | {"beta_schedule": "squaredcos_cap_v2"},
}

# The reference computes its coefficients and latents in float32 (1.2e-7 a rounding); ours are float64. Over 50 steps of
# a model that amplifies errors by at most about 2 in all, differences of log-sigmas of size 0.1 lose two digits more.
RELATIVE = 1e-5
# Cosine betas start at sigma 2e4: there the reference's own float32 step loses four digits more (1.2e-4 was seen).
RELATIVE_COSINE = 1e-3


def model(x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """A stand-in for the U-Net: nonlinear, mixing pixels, different at each timestep, and tame (slope at most 1)."""
    mixed = 0.6 * x + 0.3 * x.roll(1, dims=-1) + 0.1 * x.flip(-2)
    return torch.tanh(mixed + torch.sin(torch.as_tensor(t, dtype=x.dtype) / 70))


def reference(sampler: str, config: dict[str, Any], steps: int) -> Any:
    """The reference's scheduler object, ready for `steps` steps."""
    karras = {"use_karras_sigmas": sampler.endswith("_karras")}
    match sampler.removesuffix("_karras"):
        case "ddpm":
            made = DDPMScheduler.from_config(config)
        case "ddim":
            made = DDIMScheduler.from_config(config)
        case "euler":
            made = EulerDiscreteScheduler.from_config(config, **karras)
        case "euler_a":
            made = EulerAncestralDiscreteScheduler.from_config(config)
        case _:
            made = DPMSolverMultistepScheduler.from_config(config, **karras)
    made.set_timesteps(steps)
    if sampler == "euler_a_karras":  # the reference has no such class: Euler's Karras sigmas, the ancestral step
        euler = reference("euler_karras", config, steps)
        made.sigmas, made.timesteps = euler.sigmas, euler.timesteps
    if hasattr(made, "set_begin_index"):
        # Else it looks its place up by timestep, and skips a line where rounding made the first two timesteps equal.
        made.set_begin_index(0)
    return made


def reference_way(
    scheduler: Any, steps: int, strength: float | None, latent: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[float, torch.Tensor]]:
    """(timestep that the model is told, x after the step), as the reference's pipelines run their loop."""
    noise = torch.randn(latent.shape, generator=generator)
    timesteps = scheduler.timesteps
    if strength is None:
        x = noise * scheduler.init_noise_sigma
    else:
        stage = SimpleNamespace(scheduler=scheduler)
        timesteps, _ = StableDiffusionImg2ImgPipeline.get_timesteps(stage, steps, strength, "cpu")
        x = scheduler.add_noise(latent, noise, timesteps[:1])
    draws = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    yield -1.0, x
    for t in timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **draws).prev_sample
        yield float(t), x


def table_way(
    table: StepTable, strength: float | None, latent: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[float, torch.Tensor]]:
    """The same from a table, in float64, noise drawn in float32 as the reference draws it."""
    noise = torch.randn(latent.shape, generator=generator).double()
    x = noise * table.init_noise_scale
    if strength is not None:
        x = latent.double() * table.init_image_scale + noise * table.add_noise_scale
    before = torch.full_like(x, 1e6)  # nothing may read it on the first line
    yield -1.0, x
    for line in table.lines:
        t, c_in, c_skip, c_out, a, b, c, s, draws = (float(number) for number in line)
        denoised = c_skip * x + c_out * model(c_in * x, t)
        drawn = torch.randn(latent.shape, generator=generator).double() if draws else torch.zeros_like(x)
        x, before = a * x + b * denoised + c * before + s * drawn, denoised
        yield t, x


def assert_same_way(sampler: str, config: dict[str, Any], steps: int, strength: float | None, within: float) -> None:
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.9
    theirs, ours = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    table = step_table(sampler, NoiseSchedule.from_config(config), steps, strength)
    wanted = list(reference_way(reference(sampler, config, steps), steps, strength, latent, theirs))
    found = list(table_way(table, strength, latent, ours))
    assert len(found) == len(wanted)
    for step, ((t_found, x_found), (t_wanted, x_wanted)) in enumerate(zip(found, wanted, strict=True)):
        assert_same_timestep(sampler, t_found, t_wanted)
        off = (x_found - x_wanted).abs().max() / x_wanted.abs().max()
        assert off < within, f"{sampler}, {steps} steps, strength {strength}: off by {off:.1e} after step {step}"
    assert torch.equal(theirs.get_state(), ours.get_state()), "a different number of draws"


def assert_same_timestep(sampler: str, found: float, wanted: float) -> None:
    if sampler in ("euler_karras", "euler_a_karras"):
        # The fraction of a timestep is found in the log of float32 sigmas: 1e-7 of a log that rises 1e-3 a timestep.
        assert found == pytest.approx(wanted, abs=2e-4)
    else:
        assert np.float32(found) == np.float32(wanted)  # linspace timesteps of Euler are float32 fractions there


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_step_is_the_references(sampler: str, config: str, prediction: str, steps: int) -> None:
    for strength in (None, 0.3, 0.75, 1.0):
        assert_same_way(sampler, CONFIGS[config] | {"prediction_type": prediction}, steps, strength, RELATIVE)


@pytest.mark.parametrize("betas", OTHER_BETAS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_other_betas_are_the_references(sampler: str, betas: str) -> None:
    within = RELATIVE_COSINE if betas == "cosine" else RELATIVE
    for prediction in ("epsilon", "v_prediction"):
        for strength in (None, 0.75):
            assert_same_way(sampler, OTHER_BETAS[betas] | {"prediction_type": prediction}, 20, strength, within)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_real_folders_file_means_what_the_reference_makes_of_it(sampler: str) -> None:
    """The reference loads the file as the class that it names, then turns that into the sampler's class."""
    loaded = dict(PNDMScheduler.from_config(SD15_FILE).config)
    table = step_table(sampler, NoiseSchedule.from_config(SD15_FILE), 20)
    for found, wanted in zip(table.lines[:, Col.t], reference(sampler, loaded, 20).timesteps, strict=True):
        assert_same_timestep(sampler, found, float(wanted))


def test_euler_a_karras_is_k_diffusions_ancestral_step() -> None:
    """Against `get_ancestral_step` and `sample_euler_ancestral` of k-diffusion (eta 1), written out for one number."""
    schedule, x, y = NoiseSchedule(), 3.0, 3.0
    table = step_table("euler_a_karras", schedule, 12)
    sigmas = [*step_table("euler_karras", schedule, 12).lines[:, Col.c_out] * -1, 0.0]  # epsilon: c_out is -sigma
    for line, (now, after), noise in zip(table.lines, pairwise(sigmas), np.sin(range(12)), strict=True):
        up = min(after, (after**2 * (now**2 - after**2) / now**2) ** 0.5)
        down = (after**2 - up**2) ** 0.5
        denoised = np.tanh(x)
        x += (x - denoised) / now * (down - now) + noise * up
        denoised = np.tanh(y)
        y = line[Col.a] * y + line[Col.b] * denoised + line[Col.c] * 0 + line[Col.s] * noise
        assert y == pytest.approx(x, rel=1e-12)  # both float64: a few roundings, and one difference of squares


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_strength_that_leaves_no_step_makes_the_last_one(sampler: str) -> None:
    schedule = NoiseSchedule()
    table = step_table(sampler, schedule, 20, strength=0.01)
    assert len(table) == 1
    last = step_table(sampler, schedule, 20).lines[-1].copy()
    last[Col.b], last[Col.c] = last[Col.b] + last[Col.c], 0.0
    assert np.array_equal(table.lines[0], last)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_few_and_many_steps_are_a_finite_table(sampler: str, config: str) -> None:
    for prediction in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule.from_config(CONFIGS[config] | {"prediction_type": prediction})
        for steps in (1, 2, 3, 61, 333, 998):
            table = step_table(sampler, schedule, steps)
            assert table.lines.shape == (steps, len(Col))
            assert np.isfinite(table.lines).all()
            assert table.lines[0, Col.c] == 0


def test_no_line_starts_from_a_denoised_before_that_is_not_there() -> None:
    for start in range(1, 11):
        assert step_table("dpmpp_2m", NoiseSchedule(), 10, strength=start / 10).lines[0, Col.c] == 0


def test_steps_that_the_schedule_cannot_lay_out_are_refused_by_name() -> None:
    """The reference fails here with an IndexError (timestep 1000), a NaN, or an error of its own."""
    for sampler, steps in [("ddpm", 1000), ("ddim", 1000), ("dpmpp_2m", 999), ("dpmpp_2m", 1000), ("euler", 1001)]:
        with pytest.raises(InvalidRequest, match=f"steps={steps}"):
            step_table(sampler, NoiseSchedule(), steps)


def test_an_unknown_sampler_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequest, match=r"sampler='plms' is not allowed: one of ddpm, ddim, "):
        step_table("plms", NoiseSchedule(), 20)


def test_a_table_is_made_once_and_cannot_be_written() -> None:
    table = step_table("euler", NoiseSchedule(), 20)
    assert step_table("euler", NoiseSchedule(), 20) is table
    with pytest.raises(ValueError, match="read-only"):
        table.lines[0, Col.t] = 1
