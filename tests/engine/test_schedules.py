"""Noise schedules beside the reference's own numbers, and what a folder's file may say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from sd_engine.errors import InvalidRequest, WeightsError
from sd_engine.families import SD2
from sd_engine.model import SD1
from sd_engine.schedules import NoiseSchedule, exponential_sigmas, karras_sigmas

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
def test_alphas_are_the_references_to_the_bit(betas: str) -> None:
    """Some timesteps are truncated, so the last bit of a noise level can be a whole timestep."""
    wanted = DDPMScheduler.from_config(BETAS[betas]).alphas_cumprod.numpy()
    found = NoiseSchedule.from_config(BETAS[betas]).alphas_cumprod
    assert found.dtype == np.float64
    if betas == "cosine":  # numpy's and Python's cosine may differ in their last bit
        np.testing.assert_allclose(found, wanted, rtol=2e-6)
    else:
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("betas", BETAS)
def test_zero_terminal_snr_is_the_references(betas: str) -> None:
    config = BETAS[betas] | {"rescale_betas_zero_snr": True}
    schedule = NoiseSchedule.from_config(config)
    wanted = DDPMScheduler.from_config(config).alphas_cumprod.numpy()
    assert schedule.alphas_cumprod[-1] == wanted[-1] == 0
    # Differences of float32 roots, of which torch's own are not always rounded right: 6e-8 each.
    np.testing.assert_allclose(np.sqrt(schedule.alphas_cumprod), np.sqrt(wanted), rtol=0, atol=5e-7)
    largest = float(EulerDiscreteScheduler.from_config(config).sigmas[0])
    assert schedule.train_sigmas[-1] == pytest.approx(largest, rel=2e-7) == pytest.approx(4096, rel=2e-7)


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


@pytest.mark.parametrize("betas", ["sd15", "mini", "linear"])
def test_exponential_timesteps_of_every_count_truncate_to_the_references(betas: str) -> None:
    config = BETAS[betas]
    schedule = NoiseSchedule.from_config(config)
    made = DPMSolverMultistepScheduler.from_config(config, use_exponential_sigmas=True)
    for steps in range(2, 60):
        made.set_timesteps(steps)
        sigmas = exponential_sigmas(schedule.train_sigmas[-1], schedule.train_sigmas[0], steps)
        # torch's float32 roots are not always rounded right (1.2e-7), so a fraction next to a whole can fall below it.
        np.testing.assert_allclose(sigmas, made.sigmas[:-1], rtol=2e-7)
        nearest = np.floor(schedule.sigma_to_t(sigmas) + np.array([[-1e-3], [1e-3]]))
        assert ((nearest[0] <= made.timesteps.numpy()) & (made.timesteps.numpy() <= nearest[1])).all()


def test_given_betas_are_taken_as_they_are() -> None:
    betas = np.geomspace(1e-4, 0.2, 100)
    schedule = NoiseSchedule.from_config({"trained_betas": betas.tolist(), "num_train_timesteps": 100})
    made: Any = DDPMScheduler(trained_betas=betas.tolist(), num_train_timesteps=100)
    wanted = made.alphas_cumprod.numpy()
    assert np.array_equal(schedule.alphas_cumprod, wanted)


@pytest.mark.parametrize("betas", [[0.1, 0.2], [0.5] * 999 + [1.0], [0.5] * 999 + [float("nan")], []])
def test_betas_that_are_no_schedule_are_refused(betas: list[float]) -> None:
    with pytest.raises(
        WeightsError, match=r"trained_betas=\d+ numbers from .* num_train_timesteps=1000 numbers between"
    ):
        NoiseSchedule.from_config({"trained_betas": betas})


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
        set_alpha_to_one=None,
    )


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# What the files of well-known folders say, each under the class that it names.
FILES: dict[str, tuple[dict[str, Any], NoiseSchedule]] = {
    "PNDMScheduler (SD 1.5)": (
        SD | {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
        NoiseSchedule(spacing=None),
    ),
    "DDIMScheduler (SD 2.1)": (
        SD
        | {"clip_sample": False, "prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1}
        | {"skip_prk_steps": True, "trained_betas": None},
        NoiseSchedule(spacing=None, prediction="v_prediction"),
    ),
    "EulerDiscreteScheduler (SD Turbo)": (
        SD
        | {"clip_sample": False, "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0}
        | {"set_alpha_to_one": False, "sigma_max": None, "sigma_min": None, "skip_prk_steps": True, "steps_offset": 1}
        | {"timestep_spacing": "trailing", "timestep_type": "discrete", "use_karras_sigmas": False},
        NoiseSchedule(spacing="trailing"),
    ),
    "DPMSolverMultistepScheduler, as many community folders have it": (
        SD
        | {"algorithm_type": "sde-dpmsolver++", "dynamic_thresholding_ratio": 0.995, "euler_at_final": False}
        | {"final_sigmas_type": "sigma_min", "lambda_min_clipped": -float("inf"), "lower_order_final": True}
        | {"solver_order": 3, "solver_type": "heun", "steps_offset": 1, "thresholding": False, "use_lu_lambdas": True}
        | {"timestep_spacing": "leading", "use_karras_sigmas": True, "use_exponential_sigmas": False}
        | {"variance_type": None, "use_flow_sigmas": False, "use_beta_sigmas": True},
        NoiseSchedule(set_alpha_to_one=None),
    ),
    "DDIMScheduler with zero terminal SNR": (
        SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        NoiseSchedule(
            spacing="trailing", prediction="v_prediction", zero_snr=True, steps_offset=0, set_alpha_to_one=None
        ),
    ),
    "LCMScheduler": (
        SD | {"original_inference_steps": 100, "timestep_scaling": 10.0, "set_alpha_to_one": True, "steps_offset": 1},
        NoiseSchedule(spacing=None, set_alpha_to_one=True, lcm_steps=100),
    ),
    "DDPMScheduler that predicts the picture": (
        SD | {"prediction_type": "sample", "variance_type": "fixed_large", "steps_offset": 1},
        NoiseSchedule(spacing=None, prediction="sample", set_alpha_to_one=None),
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_a_real_folders_file_is_read_and_its_choice_of_a_sampler_left_to_the_request(file: str) -> None:
    config, wanted = FILES[file]
    assert NoiseSchedule.from_config(config | {"_class_name": file.split()[0]}) == wanted


def test_a_file_without_configurations_is_drawn_as_the_folder_of_the_same_model() -> None:
    """With a spacing of its own it would start Euler at timestep 951 instead of 999: another picture of each seed."""
    for file, configs in (("PNDMScheduler (SD 1.5)", SD1), ("DDIMScheduler (SD 2.1)", SD2)):
        assert configs.schedule == NoiseSchedule.from_config(FILES[file][0])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("prediction_type", "flow_prediction"),
        ("beta_schedule", "sigmoid"),
        ("timestep_spacing", "uneven"),
        ("clip_sample", True),
        ("thresholding", True),
        ("variance_type", "learned"),
        ("interpolation_type", "log_linear"),
        ("timestep_type", "continuous"),
        ("sigma_max", 700.0),
        ("use_flow_sigmas", True),
        ("timestep_scaling", 1.0),
    ],
)
def test_a_setting_that_is_not_built_is_refused_by_name_and_value(setting: str, value: object) -> None:
    with pytest.raises(WeightsError) as refused:
        NoiseSchedule.from_config({setting: value})
    assert f"{setting}={value!r}" in str(refused.value)


def test_more_steps_than_training_had_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="steps=101 is not allowed: 1 to 100"):
        NoiseSchedule(train_steps=100).timesteps(101, default="leading")
