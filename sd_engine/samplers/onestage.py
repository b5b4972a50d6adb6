"""Euler, Euler ancestral and LMS: one call of the model a step, on sigmas, for alpha = 1.

Sources: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its noise; k-diffusion, `sample_euler_ancestral` and
`sample_lms` (Katherine Crowson); diffusers' EulerDiscrete, EulerAncestralDiscrete and LMSDiscrete schedulers.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from sd_engine.samplers.layouts import Levels
from sd_engine.samplers.table import M1, M2, M3, D, Line, X
from sd_engine.schedules import Floats

LMS_ORDER: Final = 4


def euler(levels: Levels) -> list[Line]:
    """Along the derivative (x - D) / sigma."""
    return [Line(t, 1.0, now, toward(now, after)) for t, now, after in levels.steps()]


def euler_a(levels: Levels) -> list[Line]:
    """Down to sigma_down without noise, then back up with new noise; the reference draws on the last line too."""
    lines = []
    for t, now, after in levels.steps():
        down, up = ancestral(now, after)
        lines.append(Line(t, 1.0, now, toward(now, down), s=up, draws=True))
    return lines


def ancestral(now: float, after: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): where a step from `now` ends without noise, and how much noise then leads to `after`."""
    return after**2 / now, after * float(np.sqrt(1 - (after / now) ** 2))


def lms(levels: Levels) -> list[Line]:
    """A polynomial through the last four derivatives, or as many as there are, integrated over the step.

    An img2img starts with one derivative, as k-diffusion does. The reference class takes weights for four there, of
    which it has one: its own pictures at strength < 1 are wrong by that.
    """
    lines = []
    past = (M1, M2, M3)
    for i, (t, now, after) in enumerate(levels.steps()):
        order = min(i + 1, LMS_ORDER)
        derivatives = ((X - D) / now, *past)[:order]
        weights = _adams(levels.sigma[i - order + 1 : i + 1][::-1], after)
        moved = X + sum((w * d for w, d in zip(weights, derivatives, strict=True)), start=np.zeros_like(X))
        lines.append(Line(t, 1.0, now, moved, derivatives[: LMS_ORDER - 1]))
    return lines


def _adams(sigmas: Floats, after: float) -> list[float]:
    """Integrals from sigmas[0] to `after` of the Lagrange polynomials over `sigmas`."""
    shifted = sigmas - sigmas[0]  # near 0, where the powers lose nothing
    weights = []
    for k, own in enumerate(shifted):
        others = np.delete(shifted, k)
        integral = np.polyint(np.atleast_1d(np.poly(others)) / np.prod(own - others))
        weights.append(float(np.polyval(integral, after - sigmas[0])))
    return weights


def toward(now: float, after: float, x: Floats = X) -> Floats:
    """x moved from sigma `now` to `after` along a straight line to D."""
    return after / now * x + (1 - after / now) * D
