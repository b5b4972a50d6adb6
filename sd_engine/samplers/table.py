"""The form of every sampler: a table of numbers, one line for each call of the model.

One line of one image is, for every sampler,

    D                    = c_skip * x + c_out * model(c_in * x, t)
    (x', m1', ..., m4')  = mix @ (x, D, m1, ..., m4)
    x'                  += s * noise

with `D` the denoised prediction and `m` four slots of memory, in which a sampler keeps what it likes (earlier D or
derivatives, the latent before its first stage). All of it is computed in float64 on the host. Rows of different
samplers can therefore share one U-Net call, and a new sampler is one more function that returns lines.

A latent is `x = alpha * picture + sigma * noise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import numpy as np

from sd_engine.schedules import Floats, Prediction


class Col(IntEnum):
    """The columns of a step table."""

    t = 0  # the timestep that the model is told; a fraction where the reference tells one
    c_in = 1
    c_skip = 2
    c_out = 3
    s = 4
    draws = 5  # 1: the reference draws noise on this line, even where s is 0; the image's noise source must follow
    alpha_after = 6  # scale of the picture in x after the line; 1 after the last
    sigma_after = 7  # scale of the noise in x after the line; 0 after the last


SLOTS: Final = 5  # x and four slots of memory; `mix` has one more column, for D

# What a line may take from, as unit vectors: `0.5 * X + 0.5 * D` is a row of `mix`. Read only.
_UNITS = np.eye(SLOTS + 1)
_UNITS.setflags(write=False)
X, D, M1, M2, M3, M4 = _UNITS


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """The whole way of one image. lines: float64 [N, 8], columns as `Col`; mix: float64 [N, 5, 6]; both read only.

    txt2img starts from `noise * init_noise_scale`, img2img from `latent * init_image_scale + noise * add_noise_scale`.
    """

    lines: Floats
    mix: Floats
    init_noise_scale: float
    init_image_scale: float
    add_noise_scale: float

    def __len__(self) -> int:
        return len(self.lines)

    def live(self, step: int) -> list[int]:
        """The slots of the state that the lines from `step` on still read, x (0) among them: all that must be kept."""
        live = [0]
        for mix in self.mix[: step - len(self) - 1 : -1] if step < len(self) else ():
            read = (mix[live] != 0).any(axis=0)  # of x, D, m1, ...
            live = [0, *(slot for slot in range(1, SLOTS) if read[slot + 1])]
        return live


class Line(NamedTuple):
    """What a sampler decides for one call of the model.

    t: what the model is told. alpha, sigma: the scales of picture and noise in x before the line; `D` is read with
    them. x: float64 [6], the next x as a sum of X, D, M1..M4. memory: the next m1, m2, ... likewise, 0 where left out.
    s: the scale of the noise that is added to x. draws: noise is drawn, even where s is 0.
    """

    t: float
    alpha: float
    sigma: float
    x: Floats
    memory: tuple[Floats, ...] = ()
    s: float = 0.0
    draws: bool = False


class Way(NamedTuple):
    """The lines of one image, and the scale of the noise that txt2img starts from."""

    lines: Sequence[Line]
    init_noise_scale: float


def tabulate(way: Way, prediction: Prediction) -> StepTable:
    """The table of a way, for a model that predicts `prediction`. Not finite where the sampler divided by nothing."""
    lines = way.lines
    alpha, sigma = np.array([line.alpha for line in lines]), np.array([line.sigma for line in lines])
    c_in, c_skip, c_out = _folded(alpha, sigma, prediction)
    after = np.append(alpha[1:], 1.0), np.append(sigma[1:], 0.0)
    t, s = [line.t for line in lines], [line.s for line in lines]
    columns = np.stack([t, c_in, c_skip, c_out, s, [float(line.draws) for line in lines], *after], axis=1)
    mix = np.zeros((len(lines), SLOTS, SLOTS + 1))
    for rows, line in zip(mix, lines, strict=True):
        rows[: 1 + len(line.memory)] = [line.x, *line.memory]
    columns.setflags(write=False)
    mix.setflags(write=False)
    return StepTable(columns, mix, way.init_noise_scale, float(alpha[0]), float(sigma[0]))


def _folded(alpha: Floats, sigma: Floats, prediction: Prediction) -> tuple[Floats, Floats, Floats]:
    """c_in, c_skip, c_out. The U-Net always sees unit variance, so they follow from alpha and sigma alone."""
    c_in = 1 / np.hypot(alpha, sigma)
    if prediction == "epsilon":  # x = alpha * D + sigma * eps
        return c_in, 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":  # v = (alpha * eps - sigma * D) * c_in (arXiv 2202.00512, appendix D)
        return c_in, c_in**2 * alpha, -c_in * sigma
    return c_in, np.zeros_like(alpha), np.ones_like(alpha)
