"""Heun, DPM2, DPM2 ancestral, DPM++ SDE and DPM++ 2S ancestral: two calls of the model a step, on sigmas, alpha = 1.

A step is two lines. m1 keeps the latent before the first ("the anchor"), from which the second starts again. The last
step, to sigma 0, is one line to D, as there is no level between.

Sources: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 (Heun); k-diffusion `sample_dpm_2`,
`sample_dpm_2_ancestral`, `sample_dpmpp_sde`, `sample_dpmpp_2s_ancestral` (Katherine Crowson, after arXiv 2206.00927 and
2211.01095); diffusers' HeunDiscrete, KDPM2Discrete, KDPM2AncestralDiscrete and DPMSolverSDE schedulers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

import numpy as np

from sd_engine.samplers.layouts import Levels
from sd_engine.samplers.onestage import ancestral, toward
from sd_engine.samplers.table import M1, M2, D, Line, X

# (t, sigma before, the level between, sigma after, t between) -> the two lines of a step
_Stages = Callable[[float, float, float, float, float], tuple[Line, Line]]


def heun(levels: Levels) -> list[Line]:
    """Euler's step as a trial, then the step with the mean of the derivatives at both its ends."""

    def stages(t: float, now: float, between: float, after: float, t_between: float) -> tuple[Line, Line]:
        slope = (X - D) / now
        mean = (M2 + (X - D) / after) / 2
        trial = Line(t, 1.0, now, toward(now, after), (X, slope))
        return trial, Line(t_between, 1.0, after, M1 + (after - now) * mean)

    steps = levels.steps()
    inner = [(after, t) for (_, _, after), (t, _, _) in pairwise(steps)]
    return _in_two(levels, inner, stages)


def dpm2(levels: Levels) -> list[Line]:
    """The whole step along the derivative at its geometric middle."""

    def stages(t: float, now: float, between: float, after: float, t_between: float) -> tuple[Line, Line]:
        first = Line(t, 1.0, now, toward(now, between), (X,))
        return first, Line(t_between, 1.0, between, M1 + (after - now) * (X - D) / between)

    return _in_two(levels, _between(levels, lambda now, after: sqrt(now * after)), stages)


def dpm2_a(levels: Levels) -> list[Line]:
    """DPM2 down to sigma_down, then back up with new noise."""

    def stages(t: float, now: float, between: float, after: float, t_between: float) -> tuple[Line, Line]:
        down, up = ancestral(now, after)
        first = Line(t, 1.0, now, toward(now, between), (X,))
        moved = M1 + (down - now) * (X - D) / between
        return first, Line(t_between, 1.0, between, moved, s=up, draws=True)

    return _in_two(levels, _between(levels, _middle_of_descent), stages)


def dpmpp_2s_a(levels: Levels) -> list[Line]:
    """From the anchor to sigma_down with the D of the middle of that way, then back up with new noise."""

    def stages(t: float, now: float, between: float, after: float, t_between: float) -> tuple[Line, Line]:
        down, up = ancestral(now, after)
        first = Line(t, 1.0, now, toward(now, between), (X,))
        return first, Line(t_between, 1.0, between, toward(now, down, M1), s=up, draws=True)

    return _in_two(levels, _between(levels, _middle_of_descent), stages)


def dpmpp_sde(levels: Levels) -> list[Line]:
    """An ancestral step to the geometric middle, then one over the whole step with the D of the middle.

    Both draw from one Brownian path, on which the noise of the whole step is that of its first part plus that of its
    second, each weighed by the square root of its length. The path of the first part is what the first line added to
    x: m2 keeps x as it was without. So two independent draws a step give the reference's path for them; the
    reference's own draws come from a tree of another generator, so a seed's picture there is another one.
    """

    def stages(t: float, now: float, between: float, after: float, t_between: float) -> tuple[Line, Line]:
        down, up = ancestral(now, between)
        without_noise = toward(now, down)
        first = Line(t, 1.0, now, without_noise, (X, without_noise), s=up, draws=True)
        down_whole, up_whole = ancestral(now, after)
        whole = sqrt(now - after)
        shared = sqrt(now - between) / whole * up_whole / up * (X - M2)
        new = sqrt(between - after) / whole * up_whole
        moved = toward(now, down_whole, M1) + shared
        return first, Line(t_between, 1.0, between, moved, s=new, draws=True)

    return _in_two(levels, _between(levels, lambda now, after: sqrt(now * after)), stages)


def _middle_of_descent(now: float, after: float) -> float:
    return sqrt(now * ancestral(now, after)[0])


def _between(levels: Levels, middle: Callable[[float, float], float]) -> list[tuple[float, float]]:
    """The level between and its t, for each step but the last."""
    sigmas = [middle(now, after) for _, now, after in levels.steps()[:-1]]
    return list(zip(sigmas, levels.t_at(np.array(sigmas)), strict=True))


def _in_two(levels: Levels, between: list[tuple[float, float]], stages: _Stages) -> list[Line]:
    """Two lines for each step but the last, which goes to D."""
    *steps, (t, last, _) = levels.steps()
    pairs = [stages(t, now, inner, after, told) for (t, now, after), (inner, told) in zip(steps, between, strict=True)]
    return [line for pair in pairs for line in pair] + [Line(t, 1.0, last, D)]
