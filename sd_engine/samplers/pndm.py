"""PNDM as Stable Diffusion uses it (PLMS): the last four predictions of the model, on whole training timesteps.

Sources: Liu et al. 2022 (arXiv 2202.09778), equations 9 and 12; the PLMS sampler of latent-diffusion (Katherine
Crowson); diffusers' PNDMScheduler with skip_prk_steps, to whose quirks this is true:

- steps + 1 calls of the model. The second tells it the timestep of the third, and makes the first step anew.
- What is mixed is what the model predicted, v or epsilon, and only the mixture is turned into epsilon.
- An img2img starts somewhere in that list of steps + 1, so it begins one step noisier than other samplers' and tells
  the model a timestep that is one step ahead of x from its third line on.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from sd_engine.samplers.table import M1, M2, M3, D, Line, Way, X
from sd_engine.samplers.whole import signal, signal_or_end, whole_timesteps
from sd_engine.schedules import Floats, NoiseSchedule


def pndm(schedule: NoiseSchedule, steps: int, start: int) -> Way:
    """m1, m2, m3: the predictions before; on the second line m2 is the latent before the first."""
    listed = whole_timesteps(schedule, steps)
    listed = np.concatenate([listed[:2], listed[1:]])[start:]
    distance = schedule.train_steps // steps
    kept = signal(schedule, divides=True)
    lines = []
    for i, t in enumerate(listed.tolist()):
        alpha, sigma = sqrt(kept[t]), sqrt(1 - kept[t])
        mixture, memory = _mixture(i, _predicted(schedule, alpha, sigma))
        anchor = M2 if i == 1 else X
        of, to = (t + distance, t) if i == 1 else (t, t - distance)
        now, after = float(kept[of]), signal_or_end(kept, to, bool(schedule.set_alpha_to_one))
        if schedule.prediction == "v_prediction":
            mixture = sqrt(now) * mixture + sqrt(1 - now) * anchor
        lines.append(Line(t, alpha, sigma, _moved(anchor, mixture, now, after), memory))
    return Way(lines, 1.0)


def _predicted(schedule: NoiseSchedule, alpha: float, sigma: float) -> Floats:
    """What the model said, found again from x and D."""
    if schedule.prediction == "v_prediction":
        return (alpha * X - D) / sigma
    return (X - alpha * D) / sigma


def _mixture(i: int, predicted: Floats) -> tuple[Floats, tuple[Floats, ...]]:
    """What line i takes for the prediction, and what it remembers."""
    if i == 0:
        return predicted, (predicted, X)
    if i == 1:
        return (predicted + M1) / 2, (M1,)
    memory = (predicted, M1, M2)
    if i == 2:
        return (3 * predicted - M1) / 2, memory
    if i == 3:
        return (23 * predicted - 16 * M1 + 5 * M2) / 12, memory
    return (55 * predicted - 59 * M1 + 37 * M2 - 9 * M3) / 24, memory


def _moved(x: Floats, epsilon: Floats, now: float, after: float) -> Floats:
    """Equation 9: x with `now` of its variance picture, taken to `after` of it along epsilon."""
    divisor = now * sqrt(1 - after) + sqrt(now * (1 - now) * after)
    return sqrt(after / now) * x - (after - now) / divisor * epsilon
