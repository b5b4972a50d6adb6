"""Samplers beside the published formula, written out here: where the reference has no class, or one that errs.

The formulas are those of k-diffusion (Katherine Crowson), for a latent x = picture + sigma * noise and a model that
gives the denoised picture. The noise levels are those of the reference class that lays them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import exp, expm1, log, sqrt
from typing import Any

import numpy as np
import pytest
import torch

from sd_engine.samplers import SAMPLERS, Col, step_table
from sd_engine.schedules import NoiseSchedule
from tests.engine.sampler_ways import (
    CONFIGS,
    OTHER_BETAS,
    Config,
    Step,
    assert_same_steps,
    base,
    latent_of_a_picture,
    model,
    reference,
    table_way,
    truncated,
)

# diffusers 0.42 turns its sigmas into numpy in a way that numpy 2 warns of; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

# dpm2_a has a class, but one that loses its digits where sigmas are large.
PUBLISHED = [sampler for sampler in SAMPLERS if base(sampler) in ("dpmpp_2s_a", "dpmpp_3m_sde")]
PUBLISHED += ["euler_a_karras", "euler_a_exponential", "dpm2_a"]

# Both sides are float64, but the reference lays its sigmas out in float32: 6e-8 each, and from sigma 4e3 on (zero SNR)
# a few of them add up to 2e-6.
RELATIVE = 5e-6

Denoise = Callable[[torch.Tensor, float, float], torch.Tensor]  # (x, sigma, t)
Draw = Callable[[], torch.Tensor]


def get_ancestral_step(now: float, after: float) -> tuple[float, float]:
    up = min(after, sqrt(after**2 * (now**2 - after**2) / now**2))
    return sqrt(after**2 - up**2), up


def sample_euler_ancestral(
    x: torch.Tensor, denoise: Denoise, draw: Draw, sigmas: list[float], ts: list[float], t_of: Callable[[float], float]
) -> Iterator[Step]:
    for (now, after), t in zip(pairwise(sigmas), ts, strict=True):
        down, up = get_ancestral_step(now, after)
        x = x + (x - denoise(x, now, t)) / now * (down - now) + draw() * up
        yield Step(t, x)


def sample_dpm_2_ancestral(
    x: torch.Tensor, denoise: Denoise, draw: Draw, sigmas: list[float], ts: list[float], t_of: Callable[[float], float]
) -> Iterator[Step]:
    for (now, after), t in zip(pairwise(sigmas), ts, strict=True):
        down, up = get_ancestral_step(now, after)
        d = (x - denoise(x, now, t)) / now
        if down == 0:
            x = x + d * (down - now)
        else:
            middle = exp((log(now) + log(down)) / 2)
            x_2 = x + d * (middle - now)
            yield Step(t, x_2)
            t = t_of(middle)
            x = x + (x_2 - denoise(x_2, middle, t)) / middle * (down - now) + draw() * up
        yield Step(t, x)


def sample_dpmpp_2s_ancestral(
    x: torch.Tensor, denoise: Denoise, draw: Draw, sigmas: list[float], ts: list[float], t_of: Callable[[float], float]
) -> Iterator[Step]:
    for (now, after), t in zip(pairwise(sigmas), ts, strict=True):
        down, up = get_ancestral_step(now, after)
        denoised = denoise(x, now, t)
        if down == 0:
            x = x + (x - denoised) / now * (down - now)
        else:
            time, next_time = -log(now), -log(down)
            h = next_time - time
            middle = time + h / 2
            x_2 = exp(-middle) / exp(-time) * x - expm1(-h / 2) * denoised
            yield Step(t, x_2)
            t = t_of(exp(-middle))
            x = exp(-next_time) / exp(-time) * x - expm1(-h) * denoise(x_2, exp(-middle), t)
        if after > 0:
            x = x + draw() * up
        yield Step(t, x)


def sample_dpmpp_3m_sde(
    x: torch.Tensor, denoise: Denoise, draw: Draw, sigmas: list[float], ts: list[float], t_of: Callable[[float], float]
) -> Iterator[Step]:
    before: list[tuple[float, torch.Tensor]] = []  # (h, denoised), the latest first
    for (now, after), t in zip(pairwise(sigmas), ts, strict=True):
        denoised = denoise(x, now, t)
        if after == 0:
            draw()  # as the reference's class draws where the noise has no weight
            yield Step(t, denoised)
            return
        h = log(now) - log(after)
        h_eta = 2 * h
        x = exp(-h_eta) * x - expm1(-h_eta) * denoised
        if len(before) >= 2:
            (h_1, denoised_1), (h_2, denoised_2) = before[:2]
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            phi_2 = expm1(-h_eta) / h_eta + 1
            phi_3 = phi_2 / h_eta - 0.5
            x = x + phi_2 * d1 - phi_3 * d2
        elif before:
            ((h_1, denoised_1),) = before
            x = x + (expm1(-h_eta) / h_eta + 1) * (denoised - denoised_1) / (h_1 / h)
        x = x + draw() * after * sqrt(-expm1(-2 * h))
        before.insert(0, (h, denoised))
        yield Step(t, x)


FORMULAS: dict[str, Any] = {
    "euler_a": sample_euler_ancestral,
    "dpm2_a": sample_dpm_2_ancestral,
    "dpmpp_2s_a": sample_dpmpp_2s_ancestral,
    "dpmpp_3m_sde": sample_dpmpp_3m_sde,
}


def published_way(
    sampler: str, config: Config, steps: int, start: int | None, generator: torch.Generator
) -> list[Step]:
    preserving = base(sampler) == "dpmpp_3m_sde"
    laid_out = reference(sampler if preserving else sampler.replace(base(sampler), "euler"), config, steps)
    known = np.log(np.array(((1 - laid_out.alphas_cumprod) / laid_out.alphas_cumprod) ** 0.5))
    schedule = NoiseSchedule.from_config(config)

    def denoise(x: torch.Tensor, sigma: float, t: float) -> torch.Tensor:
        seen = model(x / sqrt(1 + sigma**2), t)
        if schedule.prediction == "epsilon":
            return x - sigma * seen
        return x / (1 + sigma**2) - sigma / sqrt(1 + sigma**2) * seen

    def draw() -> torch.Tensor:
        return torch.randn(1, 4, 8, 8, generator=generator).double()

    def t_of(sigma: float) -> float:
        return float(laid_out._sigma_to_t(np.array(sigma), known))

    sigmas, ts = laid_out.sigmas[start:].tolist(), laid_out.timesteps[start:].tolist()
    noise = draw()
    x = latent_of_a_picture().double() + noise * sigmas[0]
    if start is None:
        scale = float(laid_out.init_noise_sigma)
        x = noise * (scale * sqrt(1 + sigmas[0] ** 2) if preserving else scale)
    way = [Step(-1.0, x), *FORMULAS[base(sampler)](x, denoise, draw, sigmas, ts, t_of)]
    if preserving:  # the multistep classes keep x at unit variance
        return [Step(t, x / sqrt(1 + sigma**2)) for (t, x), sigma in zip(way, sigmas, strict=True)]
    return way


@pytest.mark.parametrize("config", ["sd15 leading", "sd15 linspace", "mini trailing", "cosine", "zero snr"])
@pytest.mark.parametrize(
    "sampler", [s for s in SAMPLERS if s in PUBLISHED or base(s) in ("dpmpp_2s_a", "dpmpp_3m_sde")]
)
def test_every_line_is_the_published_formulas(sampler: str, config: str) -> None:
    for prediction in ("epsilon", "v_prediction"):
        settings = {**CONFIGS, **OTHER_BETAS}[config] | {"prediction_type": prediction}
        for steps, strength in ((4, None), (20, None), (50, None), (20, 0.75)):
            theirs, ours = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
            start = None if strength is None else steps - int(steps * strength)
            wanted = published_way(sampler, settings, steps, start, theirs)
            table = step_table(sampler, NoiseSchedule.from_config(settings), steps, strength)
            told = iter([step.t for step in wanted[1:]]) if truncated(sampler) else None
            found = list(table_way(table, strength, ours, told=told))
            assert_same_steps(sampler, found, wanted, RELATIVE, f"{prediction}, {steps} steps, {strength=}")
            assert torch.equal(theirs.get_state(), ours.get_state()), "a different number of draws"


def test_the_third_order_of_3m_sde_fades_with_the_length_of_a_step() -> None:
    """What the reference's class has here goes to -1: the reason why it is not what 3M SDE is held to."""
    table = step_table("dpmpp_3m_sde", NoiseSchedule(), 900)
    inner = table.mix[450, 0, 2:5] / table.lines[450, Col.alpha_after]  # weights of D, of the one before, of its own
    h = 1e-2  # about the length of a step there, in log sigma
    assert np.abs(inner).max() < 10 * h
