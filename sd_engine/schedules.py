"""Noise schedules: how much noise there is at each training timestep, and which timesteps an image visits.

Everything here is numpy in float64 on the host. The reference is diffusers 0.42 (`scheduling_ddpm.py`,
`scheduling_euler_discrete.py`, `scheduling_dpmsolver_multistep.py`); the Karras spacing is equation 5 of
Karras et al. 2022 (arXiv 2206.00364), zero terminal SNR algorithm 1 of Lin et al. 2023 (arXiv 2305.08891).

Words: `alphas_cumprod[t]` is the part of the variance that is still picture at timestep t. `sigma` is noise over
picture, `sqrt((1 - alphas_cumprod) / alphas_cumprod)`, as in k-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from sd_engine.errors import InvalidRequest, WeightsError

Floats = npt.NDArray[np.float64]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
Prediction = Literal["epsilon", "v_prediction", "sample"]
Spacing = Literal["leading", "trailing", "linspace"]

KARRAS_RHO: Final = 7.0

# What alphas_cumprod ends with where sigma must stay finite although the schedule ends in pure noise (zero terminal
# SNR): the reference's number, the smallest positive half. Its sigma is 4096.
LEAST_ALPHA: Final = 2.0**-24

# What a schedule may be made of, far beyond every real one: 1000 timesteps, betas from 1e-4 to 0.02.
_MOST_TRAIN_STEPS: Final = 100_000
_LEAST_BETA: Final = 1e-8

# Settings of a `scheduler_config.json` that change what the network is told or means, with the values that are built
# here. A file that leaves one out means the first value. What only chooses a sampler or its order (algorithm_type,
# solver_order, use_karras_sigmas, final_sigmas_type, ...) is not read: a request's sampler says it by name.
_SUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": get_args(Prediction),
    "timestep_spacing": (None, *get_args(Spacing)),
    "rescale_betas_zero_snr": (False, True),
    "clip_sample": (False,),
    "thresholding": (False,),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_flow_sigmas": (False, None),
    "timestep_scaling": (10.0,),
}


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The noise configuration that a model was trained with; the defaults are Stable Diffusion 1.x's.

    `spacing` None means that the folder does not say: then each sampler takes its reference's own default ("leading"
    for DDPM, DDIM and PNDM, "linspace" for the others), as `from_config` of the reference does. `set_alpha_to_one`
    None likewise: True for DDIM, False for PNDM.
    trained_betas: given one by one, instead of start, end and form. zero_snr: the last timestep is rescaled to pure
    noise. lcm_steps: the steps of the schedule that a latent consistency model was distilled on.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False
    trained_betas: tuple[float, ...] | None = None
    zero_snr: bool = False
    lcm_steps: int = 50

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the dictionary of a diffusers `scheduler_config.json`; a missing key has the reference's default.

        Raises WeightsError, naming the setting and its value, for what is not built here.
        """
        settings = {key: config.get(key, allowed[0]) for key, allowed in _SUPPORTED.items()}
        for key, allowed in _SUPPORTED.items():
            if settings[key] not in allowed:
                raise WeightsError(f"scheduler_config.json: {key}={settings[key]!r} is not supported; one of {allowed}")
        to_one = config.get("set_alpha_to_one")
        return cls(
            train_steps=int(_within(config, "num_train_timesteps", 1000, 2, _MOST_TRAIN_STEPS)),
            beta_start=_within(config, "beta_start", 0.0001, _LEAST_BETA, 1 - _LEAST_BETA),
            beta_end=_within(config, "beta_end", 0.02, _LEAST_BETA, 1 - _LEAST_BETA),
            beta_schedule=settings["beta_schedule"],
            prediction=settings["prediction_type"],
            spacing=settings["timestep_spacing"],
            steps_offset=int(_within(config, "steps_offset", 0, 0, _MOST_TRAIN_STEPS)),
            set_alpha_to_one=None if to_one is None else bool(to_one),
            trained_betas=_given_betas(config),
            zero_snr=settings["rescale_betas_zero_snr"],
            lcm_steps=int(config.get("original_inference_steps", 50)),
        )

    @property
    def alphas_cumprod(self) -> Floats:
        """float64 [train_steps], falling, read only. The last is exactly 0 with zero_snr."""
        return _alphas_cumprod(self)

    @property
    def train_sigmas(self) -> Floats:
        """Noise over picture at each training timestep, rising and finite. float64 [train_steps]."""
        # Rounded to float32 as in the reference, which rounds timesteps found from them: ours must fall on its side.
        kept = self.alphas_cumprod.astype(np.float32)
        if self.zero_snr:
            kept[-1] = LEAST_ALPHA
        return np.asarray(np.sqrt((1 - kept) / kept), dtype=np.float64)

    def timesteps(self, steps: int, *, default: Spacing, spare: int = 0, whole: bool = True) -> Floats:
        """The training timesteps of an image of `steps` steps, falling. float64 [steps].

        default: the spacing when the folder names none. spare: further points at the clean end that are laid out and
        then left off (DPM-Solver's one). whole: round "linspace" to whole timesteps (Euler does not).
        Raises InvalidRequest for more steps than training had.

        One quirk of the reference is left out: for some counts of steps (61 is the first) its "trailing" range has one
        point too many through float rounding, timestep -1; ours has `steps` points.
        """
        if not 1 <= steps <= self.train_steps:
            raise InvalidRequest("steps", steps, f"1 to {self.train_steps}, the timesteps of this model's training")
        spacing, points = self.spacing or default, steps + spare
        if spacing == "leading":
            if points > self.train_steps:  # the distance would round to nothing, and every step stand still
                raise InvalidRequest("steps", steps, f"1 to {self.train_steps - spare} with leading timesteps")
            falling = np.arange(points, dtype=np.float64)[::-1][:steps]
            return falling * (self.train_steps // points) + self.steps_offset
        if spacing == "trailing":
            falling = np.arange(self.train_steps, 0, -self.train_steps / steps, dtype=np.float64)[:steps]
            return np.round(falling) - 1
        falling = np.linspace(0, self.train_steps - 1, points)[::-1][:steps]
        return np.round(falling) if whole else falling

    def sigmas_at(self, timesteps: Floats) -> Floats:
        """Sigmas of timesteps, linear between whole ones and held at the ends, as the reference interpolates."""
        return np.interp(timesteps, np.arange(self.train_steps), self.train_sigmas)

    def sigma_to_t(self, sigmas: Floats) -> Floats:
        """The fractional timesteps of sigmas, linear in log sigma and held at the ends, as the reference does."""
        # float32 logs and distances, because the reference truncates the result for some samplers.
        known, wanted = np.log(self.train_sigmas.astype(np.float32)), np.log(np.maximum(sigmas, 1e-10))
        low = np.clip(np.searchsorted(known, wanted, side="right") - 1, 0, len(known) - 2)
        part = np.clip((known[low] - wanted) / (known[low] - known[low + 1]), 0, 1)
        return np.asarray((1 - part) * low + part * (low + 1), dtype=np.float64)


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Floats:
    """Falling sigmas, evenly spaced in sigma^(1/7) (arXiv 2206.00364, equation 5). float64 [steps]."""
    high, low = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO, dtype=np.float64)


def exponential_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Floats:
    """Falling sigmas, evenly spaced in log sigma. float64 [steps]."""
    return np.asarray(np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps)), dtype=np.float64)


def _within(config: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value = float(config.get(key, default))
    if not least <= value <= most:  # nor where it is NaN
        raise WeightsError(f"scheduler_config.json: {key}={value:g} is not supported; from {least:g} to {most:g}")
    return value


def _given_betas(config: Mapping[str, Any]) -> tuple[float, ...] | None:
    betas = config.get("trained_betas")
    if betas is None:
        return None
    count = int(config.get("num_train_timesteps", 1000))
    if len(betas) != count or not all(0 < beta < 1 for beta in betas):
        found = f"{len(betas)} numbers from {min(betas, default=None)} to {max(betas, default=None)}"
        raise WeightsError(
            f"scheduler_config.json: trained_betas={found} is not supported; "
            f"num_train_timesteps={count} numbers between 0 and 1"
        )
    return tuple(map(float, betas))


@lru_cache(maxsize=16)
def _alphas_cumprod(schedule: NoiseSchedule) -> Floats:
    # Betas and alphas are rounded to float32 as the reference stores them: its sigma at timestep 0 differs from the
    # exact one by 2e-5 to 2e-4, and a model is trained and judged with the rounded numbers.
    betas = _betas(schedule)
    kept = _product(np.float32(1) - (_without_last_signal(betas) if schedule.zero_snr else betas)).astype(np.float64)
    kept.setflags(write=False)
    return kept


def _product(alphas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each alpha times all before it: multiplied up in float64 as torch does, rounded to float32."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _without_last_signal(betas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Betas shifted and scaled so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1), in float32."""
    signal = np.sqrt(_product(np.float32(1) - betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    kept = signal**2
    return np.float32(1) - np.concatenate([kept[:1], kept[1:] / kept[:-1]])


def _betas(schedule: NoiseSchedule) -> npt.NDArray[np.float32]:
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.train_steps
    if schedule.trained_betas is not None:
        return np.array(schedule.trained_betas, dtype=np.float32)
    if schedule.beta_schedule == "linear":
        return _evenly(start, end, count)
    if schedule.beta_schedule == "scaled_linear":
        return _evenly(math.sqrt(start), math.sqrt(end), count) ** 2
    kept = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - kept[1:] / kept[:-1], 0.999).astype(np.float32)


def _evenly(start: float, end: float, count: int) -> npt.NDArray[np.float32]:
    """torch.linspace in float32 to the bit: one rounded step, counted from the nearer end.

    numpy's differs in the last bit of every third number, and a timestep that is truncated later can fall a whole
    step lower for that.
    """
    first, last, index = np.float32(start), np.float32(end), np.arange(count, dtype=np.float64)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    rising, falling = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)
