"""Noise schedules: how much noise there is at each training timestep, and which timesteps an image visits.

Everything here is numpy in float64 on the host. The reference is diffusers 0.42 (`scheduling_ddpm.py`,
`scheduling_euler_discrete.py`, `scheduling_dpmsolver_multistep.py`); the Karras spacing is equation 5 of
Karras et al. 2022 (arXiv 2206.00364).

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
Prediction = Literal["epsilon", "v_prediction"]
Spacing = Literal["leading", "trailing", "linspace"]

KARRAS_RHO: Final = 7.0

# Settings of a `scheduler_config.json` that change the numbers, with the values that are built here. A file that
# leaves one out means the first value. Whether sigmas are Karras spaced is the sampler's name, not the folder's.
_SUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": (None, *get_args(Spacing)),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False,),
    "clip_sample": (False,),
    "thresholding": (False,),
    "variance_type": ("fixed_small", None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
}


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """The noise configuration that a model was trained with; the defaults are Stable Diffusion 1.x's.

    `spacing` None means that the folder does not say: then each sampler takes its reference's own default ("leading"
    for DDPM and DDIM, "linspace" for the others), as `from_config` of the reference does.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    prediction: Prediction = "epsilon"
    spacing: Spacing | None = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read the dictionary of a diffusers `scheduler_config.json`; a missing key has the reference's default.

        Raises WeightsError, naming the setting and its value, for what is not built here.
        """
        settings = {key: config.get(key, allowed[0]) for key, allowed in _SUPPORTED.items()}
        for key, allowed in _SUPPORTED.items():
            if settings[key] not in allowed:
                raise WeightsError(f"scheduler_config.json: {key}={settings[key]!r} is not supported; one of {allowed}")
        return cls(
            train_steps=int(config.get("num_train_timesteps", 1000)),
            beta_start=float(config.get("beta_start", 0.0001)),
            beta_end=float(config.get("beta_end", 0.02)),
            beta_schedule=settings["beta_schedule"],
            prediction=settings["prediction_type"],
            spacing=settings["timestep_spacing"],
            steps_offset=int(config.get("steps_offset", 0)),
            set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
        )

    @property
    def alphas_cumprod(self) -> Floats:
        """float64 [train_steps], read only."""
        return _alphas_cumprod(self)

    @property
    def train_sigmas(self) -> Floats:
        """Noise over picture at each training timestep, rising. float64 [train_steps]."""
        # Rounded to float32 as in the reference, which rounds Karras timesteps: they must fall on the same side.
        kept = self.alphas_cumprod.astype(np.float32)
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
        train_logs = np.log(self.train_sigmas.astype(np.float32))
        return np.interp(np.log(sigmas), train_logs, np.arange(self.train_steps))


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int) -> Floats:
    """Falling sigmas, evenly spaced in sigma^(1/7) (arXiv 2206.00364, equation 5). float64 [steps]."""
    high, low = sigma_max ** (1 / KARRAS_RHO), sigma_min ** (1 / KARRAS_RHO)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** KARRAS_RHO, dtype=np.float64)


@lru_cache(maxsize=16)
def _alphas_cumprod(schedule: NoiseSchedule) -> Floats:
    # Betas and alphas are rounded to float32 as the reference stores them: its sigma at timestep 0 differs from the
    # exact one by 2e-5 to 2e-4, and a model is trained and judged with the rounded numbers.
    alphas = np.float32(1) - _betas(schedule)
    kept = np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64)
    kept.setflags(write=False)
    return kept


def _betas(schedule: NoiseSchedule) -> npt.NDArray[np.float32]:
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.train_steps
    betas: npt.NDArray[np.float32]
    if schedule.beta_schedule == "linear":
        betas = np.linspace(start, end, count).astype(np.float32)
    elif schedule.beta_schedule == "scaled_linear":
        betas = np.linspace(math.sqrt(start), math.sqrt(end), count).astype(np.float32) ** 2
    else:
        kept = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - kept[1:] / kept[:-1], 0.999).astype(np.float32)
    return betas
