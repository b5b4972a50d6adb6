"""Samplers as tables of numbers: one line per step, computed in float64 on the host.

One step of one image is, for every sampler here,

    D                    = c_skip * x + c_out * model(c_in * x, t)
    (x', m1', ..., m4')  = mix @ (x, D, m1, ..., m4)
    x'                  += s * noise

with `D` the denoised prediction and `m` four slots of memory, in which a sampler keeps what it likes (earlier D, the
latent before its first stage). Rows of different samplers can therefore share one U-Net call, and a new sampler is
one more function that fills the tables.

A latent is `x = alpha * picture + sigma * noise`. DDPM, DDIM and DPM++ 2M keep alpha^2 + sigma^2 = 1 ("variance
preserving"), Euler keeps alpha = 1 ("variance exploding"): each lives where its reference lives, so that initial
noise, draws and intermediate latents are the reference's.

Sources: DDPM arXiv 2006.11239 equations 6 and 7; DDIM arXiv 2010.02502 equation 12; Euler and Euler ancestral arXiv
2206.00364 and k-diffusion `sample_euler_ancestral`; DPM-Solver++ 2M arXiv 2211.01095 algorithm 2. Held to diffusers
0.42 step by step in `tests/engine/test_samplers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache, partial
from typing import Final

import numpy as np

from sd_engine.errors import InvalidRequest
from sd_engine.schedules import Floats, NoiseSchedule, Spacing, karras_sigmas


class Col(IntEnum):
    """The columns of a step table."""

    t = 0  # the timestep that the model is told; fractional for Euler with Karras or linspace spacing
    c_in = 1
    c_skip = 2
    c_out = 3
    s = 4
    draws = 5  # 1: the reference draws noise on this line, even where s is 0; the image's noise source must follow
    alpha_after = 6  # scale of the picture in x after the line; 1 after the last
    sigma_after = 7  # scale of the noise in x after the line; 0 after the last


SLOTS: Final = 5  # x and four slots of memory; `mix` has one more column, for D
X, D, M1 = 0, 1, 2  # columns of `mix`; its rows are x, m1, m2, m3, m4


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


@dataclass(frozen=True, slots=True, eq=False)
class _Way:
    """What a sampler decides for each step (arrays of length N); the model's prediction is folded in later.

    Each line is written as if a D_before existed; see `_mix` for the first.
    """

    t: Floats
    alpha: Floats  # scale of the picture in x, before the step
    sigma: Floats  # scale of the noise in x, before the step
    a: Floats
    b: Floats
    c: Floats
    s: Floats
    draws: Floats
    init_noise_scale: float


@lru_cache(maxsize=512)
def step_table(sampler: str, schedule: NoiseSchedule, steps: int, strength: float | None = None) -> StepTable:
    """The table of one image: `steps` lines for txt2img (strength None), the last `strength` of them for img2img.

    img2img takes the last int(steps * strength) lines, as the reference's pipeline does. Where that is none, we take
    the last one: the reference fails there, and a small strength should mean a small change.
    Raises InvalidRequest for an unknown sampler and for a count of steps that the schedule cannot lay out.
    """
    if sampler not in _BUILDERS:
        raise InvalidRequest("sampler", sampler, "one of " + ", ".join(SAMPLERS))
    way = _BUILDERS[sampler](schedule, steps)
    kept = steps if strength is None else max(1, min(int(steps * strength), steps))
    start = steps - kept
    lines, mix = _lines(way, schedule)[start:], _mix(way, start)
    if not (np.isfinite(lines).all() and np.isfinite(mix).all()):  # two noise levels coincide: refused, not drawn
        raise InvalidRequest("steps", steps, f"too many for {sampler} on this model's schedule", "take fewer")
    lines.setflags(write=False)
    mix.setflags(write=False)
    return StepTable(lines, mix, way.init_noise_scale, float(way.alpha[start]), float(way.sigma[start]))


def _lines(way: _Way, schedule: NoiseSchedule) -> Floats:
    """[N, 8]. The U-Net always sees unit variance, so c_in, c_skip and c_out follow from alpha and sigma alone."""
    c_in = 1 / np.hypot(way.alpha, way.sigma)
    if schedule.prediction == "epsilon":  # x = alpha * D + sigma * eps
        c_skip, c_out = 1 / way.alpha, -way.sigma / way.alpha
    else:  # v = (alpha * eps - sigma * D) * c_in (arXiv 2202.00512, appendix D)
        c_skip, c_out = c_in**2 * way.alpha, -c_in * way.sigma
    after = np.append(way.alpha[1:], 1.0), np.append(way.sigma[1:], 0.0)
    return np.stack([way.t, c_in, c_skip, c_out, way.s, way.draws, *after], axis=1)


def _mix(way: _Way, start: int) -> Floats:
    """[N - start, 5, 6]. The first line has no D_before: taking D for it makes that step a first-order one."""
    mix = np.zeros((len(way.t) - start, SLOTS, SLOTS + 1))
    mix[:, 0, X], mix[:, 0, D], mix[:, 0, M1] = way.a[start:], way.b[start:], way.c[start:]
    mix[:, 1, D] = 1.0  # D_before' = D
    mix[0, 0, D] += mix[0, 0, M1]
    mix[0, 0, M1] = 0.0
    return mix


def _ddpm(schedule: NoiseSchedule, steps: int) -> _Way:
    """Ancestral sampling with the smaller of the two variances ("fixed_small")."""
    t = _whole_timesteps(schedule, steps)
    now = schedule.alphas_cumprod[t]
    after = np.append(schedule.alphas_cumprod[t[1:]], 1.0)
    kept = now / after
    draws = (t > 0).astype(np.float64)
    variance = np.maximum((1 - after) / (1 - now) * (1 - kept), 1e-20)  # the reference's floor: it draws there too
    return _Way(
        t=t.astype(np.float64),
        alpha=np.sqrt(now),
        sigma=np.sqrt(1 - now),
        a=np.sqrt(kept) * (1 - after) / (1 - now),
        b=np.sqrt(after) * (1 - kept) / (1 - now),
        c=np.zeros(steps),
        s=np.sqrt(variance) * draws,
        draws=draws,
        init_noise_scale=1.0,
    )


def _ddim(schedule: NoiseSchedule, steps: int) -> _Way:
    """Deterministic DDIM (eta 0). Its next timestep is a fixed distance away, not the next of the list."""
    t = _whole_timesteps(schedule, steps)
    now = schedule.alphas_cumprod[t]
    following = t - schedule.train_steps // steps
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    after = np.where(following >= 0, schedule.alphas_cumprod[np.maximum(following, 0)], final)
    a = np.sqrt((1 - after) / (1 - now))
    zeros = np.zeros(steps)
    return _Way(
        t=t.astype(np.float64),
        alpha=np.sqrt(now),
        sigma=np.sqrt(1 - now),
        a=a,
        b=np.sqrt(after) - a * np.sqrt(now),
        c=zeros,
        s=zeros,
        draws=zeros,
        init_noise_scale=1.0,
    )


def _whole_timesteps(schedule: NoiseSchedule, steps: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    t = schedule.timesteps(steps, default=_WHOLE_SPACING).astype(np.int64)
    if t[0] >= schedule.train_steps:  # only an offset can do that; the reference fails with an IndexError
        raise InvalidRequest("steps", steps, f"fewer than {steps}, for steps_offset {schedule.steps_offset}")
    return t


def _euler(schedule: NoiseSchedule, steps: int, karras: bool = False) -> _Way:
    t, now, after = _euler_sigmas(schedule, steps, karras)
    zeros = np.zeros(steps)
    return _exploding(schedule, t, now, a=after / now, s=zeros, draws=zeros)


def _euler_a(schedule: NoiseSchedule, steps: int, karras: bool = False) -> _Way:
    """Down to sigma_down = after^2 / now without noise, then back up to `after` with new noise.

    With Karras spacing there is no reference class: the sigmas are Euler's, and it draws on each line as without.
    """
    t, now, after = _euler_sigmas(schedule, steps, karras)
    ratio = after / now
    return _exploding(schedule, t, now, a=ratio**2, s=after * np.sqrt(1 - ratio**2), draws=np.ones(steps))


def _exploding(schedule: NoiseSchedule, t: Floats, now: Floats, *, a: Floats, s: Floats, draws: Floats) -> _Way:
    # The reference's start: with "leading" timesteps x has the variance of picture and noise, else of noise alone.
    spacing = schedule.spacing or _SIGMA_SPACING
    start = float(np.hypot(now[0], 1.0)) if spacing == "leading" else float(now[0])
    return _Way(t, np.ones_like(now), now, a, 1 - a, np.zeros_like(now), s, draws, start)


def _euler_sigmas(schedule: NoiseSchedule, steps: int, karras: bool) -> tuple[Floats, Floats, Floats]:
    """t, sigma before and sigma after each step. Karras runs between the first and last sigma of the plain spacing."""
    t = schedule.timesteps(steps, default=_SIGMA_SPACING, whole=False)
    now = schedule.sigmas_at(t)
    if karras:
        now = karras_sigmas(float(now[0]), float(now[-1]), steps)
        t = schedule.sigma_to_t(now)
    return t, now, np.append(now[1:], 0.0)


def _dpmpp_2m(schedule: NoiseSchedule, steps: int, karras: bool = False) -> _Way:
    """Second order with the D before (midpoint), first order on the last line, where sigma is 0 after."""
    t, now = _dpmpp_sigmas(schedule, steps, karras)
    after = np.append(now[1:], 0.0)
    alpha, alpha_after = 1 / np.hypot(1, now), 1 / np.hypot(1, after)
    h = np.log(now[:-1] / now[1:])  # of each line but the last, whose h is infinite
    half = np.zeros(steps)  # 1 / 2r, with r the h before over this h
    with np.errstate(divide="ignore", invalid="ignore"):  # two equal sigmas: `step_table` refuses what is not finite
        half[1:-1] = h[1:] / (2 * h[:-1])
    k = alpha_after * (1 - after / now)
    zeros = np.zeros(steps)
    return _Way(
        t=t,
        alpha=alpha,
        sigma=now * alpha,
        a=(after * alpha_after) / (now * alpha),
        b=k * (1 + half),
        c=-k * half,
        s=zeros,
        draws=zeros,
        init_noise_scale=1.0,
    )


def _dpmpp_sigmas(schedule: NoiseSchedule, steps: int, karras: bool) -> tuple[Floats, Floats]:
    """t and sigma before each step. Karras runs over the whole training range, and tells the model whole timesteps."""
    if not karras:
        t = schedule.timesteps(steps, default=_SIGMA_SPACING, spare=1)
        return t, schedule.sigmas_at(t)
    now = karras_sigmas(float(schedule.train_sigmas[-1]), float(schedule.train_sigmas[0]), steps)
    t = schedule.sigma_to_t(now)
    return (np.floor(t) if schedule.beta_schedule == "squaredcos_cap_v2" else np.round(t)), now


# What the reference classes take when a folder names no spacing.
_SIGMA_SPACING: Final[Spacing] = "linspace"  # Euler, Euler ancestral, DPM++ 2M
_WHOLE_SPACING: Final[Spacing] = "leading"  # DDPM, DDIM

_BUILDERS: Final[Mapping[str, Callable[[NoiseSchedule, int], _Way]]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "euler": _euler,
    "euler_a": _euler_a,
    "dpmpp_2m": _dpmpp_2m,
    "euler_karras": partial(_euler, karras=True),
    "euler_a_karras": partial(_euler_a, karras=True),
    "dpmpp_2m_karras": partial(_dpmpp_2m, karras=True),
}
SAMPLERS: Final[tuple[str, ...]] = tuple(_BUILDERS)
