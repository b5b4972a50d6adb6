"""UniPC: one call of the model a step, used twice: to correct the step before and to predict the next one.

x between two lines is the predicted latent. The corrected one follows from the latent before the prediction, from D and
from those before, so correction and prediction fold into one line; only the corrected latent has to be remembered.

Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 and 2 with B(h) = e^h - 1, order 2; diffusers'
UniPCMultistepScheduler with its defaults (solver_order 2, bh2, first order on the last step).
"""

from __future__ import annotations

from math import expm1, inf, log

import numpy as np

from sd_engine.samplers.layouts import Levels
from sd_engine.samplers.table import M1, M2, M3, D, Line, X
from sd_engine.schedules import Floats


def unipc(levels: Levels) -> list[Line]:
    """m1: the corrected latent of the line before, m2: its D, m3: the D before that."""
    lines: list[Line] = []
    done: list[float] = []  # lengths of the steps so far, in log sigma
    for i, (t, now, after) in enumerate(levels.steps()):
        corrected = _corrected(levels.sigma[i - 1], now, done) if done else X
        h = log(now / after) if after else inf
        # Second order needs a D before; on the last step h is infinite, and the reference goes back to first order.
        bend = (D - M2) * h / (2 * done[-1]) if done and after else 0 * D
        predicted = after / now * corrected + (1 - after / now) * (D + bend)
        lines.append(Line(t, 1.0, now, predicted, (corrected, D, M2)))
        done.append(h)
    return lines


def _corrected(before: float, now: float, done: list[float]) -> Floats:
    """The latent at `now`, from that at `before` (m1): with m2, the D there, m3, the D before, and D itself."""
    kept = now / before
    if len(done) == 1:
        return kept * M1 + (1 - kept) * (M2 + (D - M2) / 2)
    earlier, h = done[-2], done[-1]
    r = -earlier / h
    phi_1 = expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 0.5
    weight_before, weight_now = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [phi_2 / phi_1, 2 * phi_3 / phi_1])
    return kept * M1 + (1 - kept) * (M2 + weight_before * (M3 - M2) / r + weight_now * (D - M2))
