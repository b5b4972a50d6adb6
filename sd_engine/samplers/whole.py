"""DDPM, DDIM and LCM: samplers on whole training timesteps, where alpha^2 + sigma^2 = 1.

Sources: DDPM arXiv 2006.11239 equations 6 and 7; DDIM arXiv 2010.02502 equations 12 and 16; LCM arXiv 2310.04378,
algorithm 3 and section 4.3; diffusers' DDPM, DDIM and LCM schedulers.
"""

from __future__ import annotations

from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt

from sd_engine.errors import InvalidRequest
from sd_engine.samplers.table import D, Line, Way, X
from sd_engine.schedules import LEAST_ALPHA, Floats, NoiseSchedule, Spacing

Whole = npt.NDArray[np.int64]

# What the reference classes take when a folder names no spacing.
DEFAULT_SPACING: Final[Spacing] = "leading"

# Of the consistency function's two weights (arXiv 2311.05556 and the reference): the picture's deviation, and the
# factor that timesteps are stretched by.
LCM_DATA_DEVIATION: Final = 0.5
LCM_STRETCH: Final = 10.0


def ddpm(schedule: NoiseSchedule, steps: int, start: int) -> Way:
    """Ancestral sampling with the smaller of the two variances ("fixed_small")."""
    t = whole_timesteps(schedule, steps)[start:]
    now = signal(schedule)[t]
    after = np.append(now[1:], 1.0)
    kept = now / after
    variance = np.maximum((1 - after) / (1 - now) * (1 - kept), 1e-20)  # the reference's floor: it draws there too
    a, b = np.sqrt(kept) * (1 - after) / (1 - now), np.sqrt(after) * (1 - kept) / (1 - now)
    lines = [
        Line(t_i, *_scales(now_i), a_i * X + b_i * D, s=sqrt(v_i) if t_i > 0 else 0.0, draws=t_i > 0)
        for t_i, now_i, a_i, b_i, v_i in zip(t.tolist(), now, a, b, variance, strict=True)
    ]
    return Way(lines, 1.0)


def ddim(schedule: NoiseSchedule, steps: int, start: int, eta: float = 0.0) -> Way:
    """From no new noise (eta 0) to as much as DDPM's (eta 1), which the reference then draws on each line.

    Its next timestep is a fixed distance away, not the next of the list.
    """
    t = whole_timesteps(schedule, steps)[start:]
    kept = signal(schedule)
    lines = []
    for t_i in t.tolist():
        now = kept[t_i]
        after = signal_or_end(kept, t_i - schedule.train_steps // steps, schedule.set_alpha_to_one is not False)
        s = eta * sqrt((1 - after) / (1 - now) * (1 - now / after))
        epsilon = (X - sqrt(now) * D) / sqrt(1 - now)
        moved = sqrt(after) * D + sqrt(max(1 - after - s**2, 0.0)) * epsilon
        lines.append(Line(t_i, *_scales(now), moved, s=s, draws=eta > 0))
    return Way(lines, 1.0)


def lcm(schedule: NoiseSchedule, steps: int, start: int) -> Way:
    """To the picture that the consistency function gives, and back up with new noise, except after the last line."""
    t = _distilled_timesteps(schedule, steps)[start:]
    now = signal(schedule)[t]
    lines = []
    for t_i, now_i, after in zip(t.tolist(), now, np.append(now[1:], 1.0), strict=True):
        stretched = t_i * LCM_STRETCH
        length = stretched**2 + LCM_DATA_DEVIATION**2
        denoised = stretched / sqrt(length) * D + LCM_DATA_DEVIATION**2 / length * X
        lines.append(Line(t_i, *_scales(now_i), sqrt(after) * denoised, s=sqrt(1 - after), draws=True))
    lines[-1] = lines[-1]._replace(draws=False)
    return Way(lines, 1.0)


def whole_timesteps(schedule: NoiseSchedule, steps: int) -> Whole:
    """The timesteps of an image, falling. int64 [steps]. Raises InvalidRequest for those that training never saw."""
    t = schedule.timesteps(steps, default=DEFAULT_SPACING).astype(np.int64)
    if t[0] >= schedule.train_steps:  # only an offset can do that; the reference fails with an IndexError
        raise InvalidRequest("steps", steps, f"fewer than {steps}, for steps_offset {schedule.steps_offset}")
    return t


def signal(schedule: NoiseSchedule, divides: bool = False) -> Floats:
    """alphas_cumprod, for a sampler that can start from pure noise; never 0 where something is divided by it."""
    kept = schedule.alphas_cumprod
    return np.where(kept > 0, kept, LEAST_ALPHA) if divides or schedule.prediction == "epsilon" else kept


def signal_or_end(kept: Floats, t: int, to_one: bool) -> float:
    """alphas_cumprod at t; past the end that of the clean picture, or of timestep 0 as Stable Diffusion's files ask."""
    if t >= 0:
        return float(kept[t])
    return 1.0 if to_one else float(kept[0])


def _scales(kept: float) -> tuple[float, float]:
    return sqrt(kept), sqrt(1 - kept)


def _distilled_timesteps(schedule: NoiseSchedule, steps: int) -> Whole:
    """Evenly chosen from the timesteps that the model was distilled on. int64 [steps]."""
    count = schedule.lcm_steps
    if not 1 <= steps <= count <= schedule.train_steps:
        raise InvalidRequest("steps", steps, f"1 to {count} with lcm, the steps that such models are distilled on")
    known = np.arange(1, count + 1) * (schedule.train_steps // count) - 1
    chosen = np.floor(np.linspace(0, count, num=steps, endpoint=False)).astype(np.int64)
    return known[::-1][chosen].astype(np.int64)
