"""What the sampler tests share: the reference's scheduler objects and our tables, driven side by side."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import sqrt
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

from sd_engine.samplers import SLOTS, Col, StepTable, step_table
from sd_engine.schedules import LEAST_ALPHA, NoiseSchedule

Config = dict[str, Any]

# What the file of a Stable Diffusion 1.5 folder says: no spacing, so each reference class takes its own default.
SD15_FILE: Final[Config] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
MINI: Final[Config] = {**SD15_FILE, "beta_end": 0.03, "steps_offset": 0, "timestep_spacing": "trailing"}
CONFIGS: Final[Mapping[str, Config]] = {
    "sd15 leading": {**SD15_FILE, "timestep_spacing": "leading"},
    "sd15 linspace": {**SD15_FILE, "timestep_spacing": "linspace"},
    "sd15 spacing not named": SD15_FILE,
    "mini trailing": MINI,
}
OTHER_BETAS: Final[Mapping[str, Config]] = {
    "linear": {
        **MINI,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "set_alpha_to_one": True,
    },
    "cosine": {**MINI, "beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {**SD15_FILE, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}

# Timesteps between whole ones are found in the log of float32 sigmas: the log's error of 2e-7, and of 5e-7 where the
# reference takes the log in float32 too, over the 1e-3 by which the log rises in a timestep.
FRACTIONS: Final = 1e-3

# The reference keeps its coefficients in float32 (1.2e-7 a rounding), where noise is drawn its latents too; ours are
# float64. Over 50 steps of a model that amplifies errors by at most about 2 in all, differences of log-sigmas of size
# 0.1 lose two digits more.
RELATIVE: Final = 1e-5


class ExactLms(LMSDiscreteScheduler):
    """The reference, whose weights are integrals of products of float32 tensors: the same of Python's numbers.

    They are a hundred times faster so, and do not lose three digits in the differences.
    """

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        tensors: torch.Tensor = self.sigmas
        self.sigmas: Any = tensors.tolist()
        try:
            return float(super().get_lms_coefficient(order, t, current_order))  # type: ignore[misc]
        finally:
            self.sigmas = tensors


class Unhurried:
    """Mixed into the reference's classes that lay a thousand steps out when they are made, in 0.1 s, for nothing."""

    def set_timesteps(self, steps: int, device: None = None, train_steps: int | None = None) -> None:
        if train_steps is None:
            super().set_timesteps(steps)  # type: ignore[misc]
        else:
            self.sigmas = torch.zeros(1)


class Heun(Unhurried, HeunDiscreteScheduler):
    pass


class Dpm2(Unhurried, KDPM2DiscreteScheduler):
    pass


class Dpm2Ancestral(Unhurried, KDPM2AncestralDiscreteScheduler):
    pass


class DpmSde(Unhurried, DPMSolverSDEScheduler):  # type: ignore[misc]
    pass


_CLASSES: Final[Mapping[str, tuple[Any, Config]]] = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "lms": (ExactLms, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (Heun, {}),
    "dpm2": (Dpm2, {}),
    "dpm2_a": (Dpm2Ancestral, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpmpp_sde": (DpmSde, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
# They draw no noise after the start, so the reference can be driven in float64. Drawing would take other numbers then.
WITHOUT_DRAWS: Final = ("ddim", "pndm", "lms", "euler", "heun", "dpm2", "dpmpp_2m", "unipc")
# Reference classes that refuse a model which predicts the picture.
NO_SAMPLE: Final = ("pndm", "euler_a", "dpm2", "dpm2_a", "dpmpp_sde")


def base(sampler: str) -> str:
    return sampler.removesuffix("_karras").removesuffix("_exponential")


def reference(sampler: str, config: Config, steps: int) -> Any:
    """The reference's scheduler object, ready for `steps` steps."""
    made = _made(sampler, json.dumps(dict(config)))
    made.set_timesteps(steps)
    made.is_scale_input_called = True
    if base(sampler) == "euler_a" and sampler != "euler_a":  # no such class: Euler's sigmas, the ancestral step
        euler = reference(sampler.replace("euler_a", "euler"), config, steps)
        made.sigmas, made.timesteps = euler.sigmas, euler.timesteps
    if hasattr(made, "set_begin_index"):
        # Else it looks its place up by timestep, and skips a line where rounding made the first two timesteps equal.
        made.set_begin_index(0)
    return made


@lru_cache(maxsize=64)
def _made(sampler: str, config: str) -> Any:
    kind, settings = _CLASSES[base(sampler)]
    spread = {"use_karras_sigmas": sampler.endswith("_karras"), "use_exponential_sigmas": sampler.endswith("ential")}
    known = inspect.signature(kind.__init__).parameters
    if base(sampler) == "euler_a":
        spread = {}
    made = kind.from_config(json.loads(config), **{k: v for k, v in {**settings, **spread}.items() if k in known})
    if json.loads(config).get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        # The class does not know the setting: give it the numbers, as its sisters make them.
        made.alphas_cumprod = EulerDiscreteScheduler.from_config(json.loads(config)).alphas_cumprod
        assert made.alphas_cumprod[-1] == LEAST_ALPHA
    return made


class Step(NamedTuple):
    """What is compared: the timestep that the model was told, and the latent after the line."""

    t: float
    x: torch.Tensor


def model(x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """A stand-in for the U-Net: nonlinear, mixing pixels, different at each timestep, and tame (slope at most 1)."""
    mixed = 0.6 * x + 0.3 * x.roll(1, dims=-1) + 0.1 * x.flip(-2)
    return torch.tanh(mixed + torch.sin(torch.as_tensor(t, dtype=x.dtype) / 70))


def latent_of_a_picture() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.9


def reference_way(
    scheduler: Any,
    steps: int,
    strength: float | None,
    generator: torch.Generator,
    exact: bool = False,
    **settings: Any,
) -> Iterator[Step]:
    """As the reference's pipelines run their loop, in float32 or `exact`. The first Step is the start."""
    latent = latent_of_a_picture()
    noise = torch.randn(latent.shape, generator=generator)
    timesteps = scheduler.timesteps
    if strength is None:
        x = noise * scheduler.init_noise_sigma
    else:
        timesteps = sliced(scheduler, steps, strength)
        x = scheduler.add_noise(latent, noise, timesteps[:1])
    if hasattr(scheduler, "noise_sampler"):
        scheduler.noise_sampler = brownian_path(generator, latent.shape)
    known = inspect.signature(scheduler.step).parameters
    given = {k: v for k, v in {"generator": generator, **settings}.items() if k in known}
    if exact:
        x = x.double()
        scheduler.sigmas = getattr(scheduler, "sigmas", x).double()
    yield Step(-1.0, x)
    for t in timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **given).prev_sample
        yield Step(float(t), x)


def sliced(scheduler: Any, steps: int, strength: float) -> torch.Tensor:
    """The timesteps of an img2img, as the reference's pipeline slices them."""
    stage = SimpleNamespace(scheduler=scheduler)
    timesteps: torch.Tensor
    timesteps, count = StableDiffusionImg2ImgPipeline.get_timesteps(stage, steps, strength, "cpu")
    if type(scheduler).__name__ == "ExactLms":
        # In the middle of its list the class takes weights for derivatives that it does not have. On the sliced list
        # it does what k-diffusion does on one.
        scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[steps - count :], scheduler.sigmas[steps - count :]
        scheduler.set_begin_index(0)
    return timesteps


def brownian_path(generator: torch.Generator, shape: torch.Size) -> Any:
    """What DPMSolverSDEScheduler asks for its noise: W(after) - W(now) over sqrt(now - after), twice a step."""
    held: list[tuple[float, torch.Tensor]] = []

    def noise(now: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        new = torch.randn(shape, generator=generator)
        if not held:
            held.append((float(after), new))
            return new
        between, first = held.pop()
        walked = first * sqrt(float(now) - between) + new * sqrt(between - float(after))
        return walked / sqrt(float(now) - float(after))

    return noise


def table_way(
    table: StepTable,
    strength: float | None,
    generator: torch.Generator,
    draws: Iterator[torch.Tensor] | None = None,
    told: Iterator[float] | None = None,
) -> Iterator[Step]:
    """The same from a table, in float64, noise drawn in float32 as the reference draws it, or taken from `draws`.

    told: the timesteps that the model is told instead of the table's, which are only compared then.
    """
    latent = latent_of_a_picture()
    noise = torch.randn(latent.shape, generator=generator).double()
    x = noise * table.init_noise_scale
    if strength is not None:
        x = latent.double() * table.init_image_scale + noise * table.add_noise_scale
    memory = torch.full((SLOTS - 1, *x.shape), 1e6, dtype=torch.float64)  # nothing may read what was not written
    yield Step(-1.0, x)
    for line, mix in zip(table.lines, table.mix, strict=True):
        t = next(told) if told else line[Col.t]
        denoised = line[Col.c_skip] * x + line[Col.c_out] * model(line[Col.c_in] * x, t)
        state = torch.tensordot(torch.tensor(mix), torch.stack([x, denoised, *memory]), dims=1)
        x, memory = state[0], state[1:]
        if line[Col.draws]:
            drawn = next(draws) if draws else torch.randn(latent.shape, generator=generator)
            x = x + line[Col.s] * drawn.double()
        yield Step(float(line[Col.t]), x)


def assert_same_way(
    sampler: str, config: Config, steps: int, strength: float | None, within: float = RELATIVE, eta: float = 0.0
) -> None:
    """Every line of a table beside every step of the reference, and the number of draws."""
    theirs, ours = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    table = step_table(sampler, NoiseSchedule.from_config(config), steps, strength, eta=eta)
    settings: dict[str, Any] = {"eta": eta} if eta else {"exact": base(sampler) in WITHOUT_DRAWS}
    wanted = list(reference_way(reference(sampler, config, steps), steps, strength, theirs, **settings))
    told = iter([step.t for step in wanted[1:]]) if truncated(sampler) else None
    found = list(table_way(table, strength, ours, told=told))
    assert_same_steps(sampler, found, wanted, within, f"{steps} steps, {strength=}")
    assert torch.equal(theirs.get_state(), ours.get_state()), "a different number of draws"


WORST: dict[str, float] = {}  # sampler -> the largest relative difference seen, for whoever wants to look


def assert_same_steps(sampler: str, found: list[Step], wanted: list[Step], within: float, of: str) -> None:
    assert len(found) == len(wanted)
    # A fraction is next to a whole where the noise levels begin and end, and hardly elsewhere.
    assert not truncated(sampler) or sum(a.t != b.t for a, b in zip(found, wanted, strict=True)) <= 2
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert_same_timestep(sampler, ours.t, theirs.t)
        off = float((ours.x - theirs.x).abs().max() / theirs.x.abs().max())
        WORST[sampler] = max(off, WORST.get(sampler, 0.0))
        # The reference's sigma_down of DPM2 a is the root of a difference of squares, in float32.
        bar = max(within, 1e-4) if base(sampler) == "dpm2_a" else within
        assert off < bar, f"{sampler}, {of}: off by {off:.1e} after step {step}"


def truncated(sampler: str) -> bool:
    """Timesteps that the reference truncates: a whole one less where a fraction next to a whole falls below it.

    It does so with torch's float32 roots, which are not rounded right on every machine.
    """
    return sampler.endswith("_exponential") and base(sampler) in PRESERVING


PRESERVING: Final = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc")


def assert_same_timestep(sampler: str, found: float, wanted: float) -> None:
    if truncated(sampler):
        assert abs(found - wanted) <= 1
        return
    on_timesteps = sampler in ("ddpm", "ddim", "pndm", "lcm")
    if on_timesteps or base(sampler) in PRESERVING or sampler in ("lms", "euler", "euler_a", "heun"):
        assert np.float32(found) == np.float32(wanted)  # linspace timesteps of Euler are float32 fractions there
    else:
        assert found == pytest.approx(wanted, abs=2e-2 if base(sampler) == "dpm2_a" else FRACTIONS)
