"""Noise schedules beside the reference's own numbers, and what a folder's file may say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from sd_engine.errors import InvalidRequest, WeightsError
from sd_engine.schedules import NoiseSchedule, karras_sigmas

# diffusers 0.42 turns its sigmas into numpy in a way that numpy 2 warns of; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SPACINGS = ("leading", "trailing", "linspace")
BETAS: dict[str, dict[str, Any]] = {
    "sd15": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "mini": {"beta_start": 0.00085, "beta_end": 0.03, "beta_schedule": "scaled_linear"},
    "linear": {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "short": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 100},
}


@pytest.mark.parametrize("betas", BETAS)
def test_alphas_are_the_references(betas: str) -> None:
    wanted = DDPMScheduler.from_config(BETAS[betas]).alphas_cumprod.numpy()
    found = NoiseSchedule.from_config(BETAS[betas]).alphas_cumprod
    assert found.dtype == np.float64
    # Both are products of a thousand float32 numbers, theirs rounded after each: a few of its 6e-8 steps apart.
    np.testing.assert_allclose(found, wanted, rtol=2e-6)
    np.testing.assert_allclose(1 - found, 1 - wanted.astype(np.float64), rtol=2e-6)


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50, 99])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_the_references(spacing: Any, steps: int) -> None:
    config = BETAS["sd15"] | {"timestep_spacing": spacing, "steps_offset": 1}
    schedule = NoiseSchedule.from_config(config)
    kinds: dict[Any, Any] = {
        DDPMScheduler: schedule.timesteps(steps, default=spacing),
        EulerDiscreteScheduler: schedule.timesteps(steps, default=spacing, whole=False).astype(np.float32),
        DPMSolverMultistepScheduler: schedule.timesteps(steps, default=spacing, spare=1),
    }
    for kind, found in kinds.items():
        made = kind.from_config(config)
        made.set_timesteps(steps)
        assert list(found) == made.timesteps.tolist()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_count_of_steps_has_that_many_falling_timesteps(spacing: Any) -> None:
    schedule = NoiseSchedule(spacing=spacing, steps_offset=0)
    for steps in range(1, 1001):
        timesteps = schedule.timesteps(steps, default=spacing)
        assert len(timesteps) == steps
        assert timesteps.min() >= 0 and timesteps.max() <= 999
        assert np.all(np.diff(timesteps) < 0)


@pytest.mark.parametrize("betas", ["sd15", "mini", "linear", "cosine"])
def test_karras_timesteps_of_every_count_round_to_the_references(betas: str) -> None:
    config = BETAS[betas]
    schedule = NoiseSchedule.from_config(config)
    made = DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True)
    for steps in range(2, 60):
        made.set_timesteps(steps)
        sigmas = karras_sigmas(schedule.train_sigmas[-1], schedule.train_sigmas[0], steps)
        found = schedule.sigma_to_t(sigmas)
        assert list(np.floor(found) if betas == "cosine" else np.round(found)) == made.timesteps.tolist()


def test_karras_sigmas_run_from_the_largest_to_the_smallest() -> None:
    sigmas = karras_sigmas(14.6, 0.03, 10)
    assert np.all(np.diff(sigmas) < 0)
    # The ends are powers of 7 of 7th roots: two roundings of float64.
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(14.6, rel=1e-14), pytest.approx(0.03, rel=1e-14))


def test_a_sigma_and_its_timestep_belong_together() -> None:
    schedule = NoiseSchedule()
    timesteps = np.arange(1000.0)
    # sigma_to_t works with the log of float32 sigmas, which rises by 1e-3 or more a timestep.
    np.testing.assert_allclose(schedule.sigma_to_t(schedule.sigmas_at(timesteps)), timesteps, atol=2e-4)


def test_alphas_are_made_once_and_cannot_be_written() -> None:
    assert NoiseSchedule().alphas_cumprod is NoiseSchedule().alphas_cumprod
    with pytest.raises(ValueError, match="read-only"):
        NoiseSchedule().alphas_cumprod[0] = 1


def test_a_missing_setting_has_the_references_default() -> None:
    assert NoiseSchedule.from_config({}) == NoiseSchedule(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        spacing=None,
        steps_offset=0,
        set_alpha_to_one=True,
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prediction_type", "sample"),
        ("beta_schedule", "sigmoid"),
        ("timestep_spacing", "uneven"),
        ("trained_betas", [0.1, 0.2]),
        ("clip_sample", True),
        ("thresholding", True),
        ("rescale_betas_zero_snr", True),
        ("variance_type", "learned"),
        ("final_sigmas_type", "sigma_min"),
        ("solver_order", 3),
    ],
)
def test_a_setting_that_is_not_built_is_refused_by_name_and_value(setting: str, value: object) -> None:
    with pytest.raises(WeightsError) as refused:
        NoiseSchedule.from_config({setting: value})
    assert f"{setting}={value!r}" in str(refused.value)


def test_more_steps_than_training_had_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="steps=101 is not allowed: 1 to 100"):
        NoiseSchedule(train_steps=100).timesteps(101, default="leading")
