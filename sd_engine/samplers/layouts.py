"""Which noise levels a sampler on sigmas visits, and in which scale its latent lives.

Two habits, each of its reference classes. "Exploding" samplers (Euler and everything of k-diffusion) keep alpha = 1:
x is the picture plus sigma times noise. "Preserving" samplers (the multistep solvers) keep alpha^2 + sigma^2 = 1. Each
lives where its reference lives, so that initial noise, draws and intermediate latents are the reference's. The lines
of both are written for alpha = 1, where a line is simplest, and scaled afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np

from sd_engine.samplers.table import Line, Way, X
from sd_engine.schedules import Floats, NoiseSchedule, Spacing, exponential_sigmas, karras_sigmas

Spread = Literal["plain", "karras", "exponential"]

# What the reference classes take when a folder names no spacing.
DEFAULT_SPACING: Final[Spacing] = "linspace"

_SPREAD: Final = {"karras": karras_sigmas, "exponential": exponential_sigmas}


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The noise levels of one image. t: float64 [N], what the model is told; sigma: float64 [N + 1], 0 at the end."""

    t: Floats
    sigma: Floats
    schedule: NoiseSchedule

    def steps(self) -> list[tuple[float, float, float]]:
        """t, sigma before and sigma after each step."""
        return [(float(t), *pair) for t, pair in zip(self.t, pairwise(self.sigma.tolist()), strict=True)]

    def t_at(self, sigma: Floats) -> list[float]:
        """What the model is told at sigmas between the levels."""
        return self.schedule.sigma_to_t(sigma).tolist()


Sampler = Callable[[Levels], Sequence[Line]]


def exploding(
    sampler: Sampler, schedule: NoiseSchedule, steps: int, start: int, spread: Spread, whole_karras: bool = False
) -> Way:
    """The way of a sampler with alpha = 1, from step `start` on.

    Karras and exponential sigmas run between the first and last sigma of the plain spacing. whole_karras: the model is
    told whole timesteps on Karras sigmas, as the reference classes of DPM2 do.
    """
    t = schedule.timesteps(steps, default=DEFAULT_SPACING, whole=False)
    sigma = schedule.sigmas_at(t)
    # The reference's start: with "leading" timesteps x has the variance of picture and noise, else of noise alone.
    spacing = schedule.spacing or DEFAULT_SPACING
    if spread != "plain":
        sigma = _SPREAD[spread](float(sigma[0]), float(sigma[-1]), steps)
        t = schedule.sigma_to_t(sigma)
    if spread == "karras" and whole_karras:
        t = np.round(t)
    scale = float(np.hypot(sigma[0], 1.0)) if spacing == "leading" else float(sigma[0])
    return Way(sampler(Levels(t[start:], np.append(sigma, 0.0)[start:], schedule)), scale)


def preserving(
    sampler: Sampler, schedule: NoiseSchedule, steps: int, start: int, spread: Spread, floors_cosine: bool = True
) -> Way:
    """The way of a sampler with alpha^2 + sigma^2 = 1, from step `start` on.

    Karras and exponential sigmas run over the whole training range. The model is told whole timesteps, rounded for
    Karras and cut off for exponential sigmas. floors_cosine: with cosine betas they are cut off for Karras too, as the
    reference class of DPM-Solver++ does and that of UniPC does not.
    """
    if spread == "plain":
        t = schedule.timesteps(steps, default=DEFAULT_SPACING, spare=1)
        sigma = schedule.sigmas_at(t)
    else:
        sigma = _SPREAD[spread](float(schedule.train_sigmas[-1]), float(schedule.train_sigmas[0]), steps)
        t = schedule.sigma_to_t(sigma)
        cut = spread == "exponential" or (floors_cosine and schedule.beta_schedule == "squaredcos_cap_v2")
        t = np.floor(t) if cut else np.round(t)
    lines = sampler(Levels(t[start:], np.append(sigma, 0.0)[start:], schedule))
    return Way(_preserved(lines), 1.0)


def _preserved(lines: Sequence[Line]) -> list[Line]:
    """Lines that were written for alpha = 1, for x that is alpha times as large; what memory keeps stays as it was."""
    alphas = [1 / float(np.hypot(1.0, line.sigma)) for line in lines] + [1.0]
    return [
        line._replace(
            alpha=alpha,
            sigma=line.sigma * alpha,
            x=after * _shrunk(line.x, alpha),
            memory=tuple(_shrunk(kept, alpha) for kept in line.memory),
            s=line.s * after,
        )
        for line, (alpha, after) in zip(lines, pairwise(alphas), strict=True)
    ]


def _shrunk(combination: Floats, alpha: float) -> Floats:
    return combination + combination[0] * (1 / alpha - 1) * X
