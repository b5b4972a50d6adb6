"""DPM++ 2M, 2M SDE and 3M SDE: one call of the model a step, with the D of the steps before, on sigmas, for alpha = 1.

h is the length of a step in log sigma, r that of a step before over it. On the last step, to sigma 0, h is infinite and
x becomes D.

Sources: DPM-Solver++ (arXiv 2211.01095), algorithm 2; k-diffusion `sample_dpmpp_2m_sde` (midpoint) and
`sample_dpmpp_3m_sde` (Katherine Crowson), eta 1; diffusers' DPMSolverMultistepScheduler. Its third order for the SDE
differs: in its weight of the second difference 1/2 is subtracted where it must be added (the weight must vanish with
the step's length, and goes to -1 there), so 3M SDE is held to k-diffusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import expm1, inf, log, sqrt

from sd_engine.samplers.layouts import Levels
from sd_engine.samplers.table import M1, M2, D, Line, X
from sd_engine.schedules import Floats


def dpmpp_2m(levels: Levels) -> list[Line]:
    """Second order (midpoint), without noise."""
    lines = []
    for t, now, after, (h, before, _) in _lengths(levels):
        aim = D + _midpoint(h, before)
        lines.append(Line(t, 1.0, now, after / now * X + (1 - after / now) * aim, (D,)))
    return lines


def dpmpp_2m_sde(levels: Levels) -> list[Line]:
    """Second order (midpoint), with as much noise as an ancestral step; the reference draws on the last line too."""
    lines = []
    for t, now, after, (h, before, _) in _lengths(levels):
        kept = (after / now) ** 2
        aim = D + _midpoint(h, before)
        s = after * sqrt(1 - kept)
        lines.append(Line(t, 1.0, now, kept * X + (1 - kept) * aim, (D,), s=s, draws=True))
    return lines


def dpmpp_3m_sde(levels: Levels) -> list[Line]:
    """Third order with noise, second and first order where there are not yet so many D before."""
    lines = []
    for t, now, after, lengths in _lengths(levels):
        kept = (after / now) ** 2
        moved = kept * X + (1 - kept) * D + _third_order(*lengths)
        s = after * sqrt(1 - kept)
        lines.append(Line(t, 1.0, now, moved, (D, M1), s=s, draws=True))
    return lines


def _midpoint(h: float, before: float | None) -> Floats:
    if before is None or h == inf:
        return 0 * D
    return (D - M1) * h / (2 * before)


def _third_order(h: float, before: float | None, first: float | None) -> Floats:
    """What the differences of D add to x; first: the length of the step before the one before."""
    if before is None or h == inf:
        return 0 * D
    twice = 2 * h
    phi_2 = expm1(-twice) / twice + 1
    slope = (D - M1) * h / before
    if first is None:
        return phi_2 * slope
    phi_3 = phi_2 / twice - 0.5
    r, r_first = before / h, first / h
    bend = (slope - (M1 - M2) * h / first) / (r + r_first)
    return phi_2 * (slope + r * bend) - phi_3 * bend


def _lengths(
    levels: Levels,
) -> Iterator[tuple[float, float, float, tuple[float, float | None, float | None]]]:
    """t, sigma before, sigma after, and the lengths of the step and of the two before it, where there are such."""
    before: float | None = None
    first: float | None = None
    for t, now, after in levels.steps():
        h = log(now / after) if after else inf
        yield t, now, after, (h, before, first)
        before, first = h, before
