"""What every sampler's table promises, whatever its formula."""

from __future__ import annotations

import numpy as np
import pytest

from sd_engine.errors import InvalidRequest
from sd_engine.samplers import SAMPLERS, SLOTS, Col, StepTable, step_table
from sd_engine.schedules import NoiseSchedule
from tests.engine.sampler_ways import CONFIGS, OTHER_BETAS, base

TWO_STAGES = ("heun", "dpm2", "dpm2_a", "dpmpp_sde", "dpmpp_2s_a")
NO_SUFFIX = ("ddpm", "ddim", "pndm", "lcm")


def lines_of(sampler: str, steps: int) -> int:
    if base(sampler) in TWO_STAGES:
        return 2 * steps - 1
    return steps + (sampler == "pndm" and steps > 1)


def test_every_sampler_on_sigmas_comes_in_three_spreads() -> None:
    bases = {base(sampler) for sampler in SAMPLERS}
    spread = [name + suffix for name in bases - set(NO_SUFFIX) for suffix in ("", "_karras", "_exponential")]
    assert set(SAMPLERS) == {*spread, *NO_SUFFIX}
    assert len(SAMPLERS) == len(set(SAMPLERS)) == 4 + 12 * 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_x_is_after_each_line_as_noisy_as_the_table_says(sampler: str) -> None:
    """Of a picture that the model always guesses right, x keeps alpha parts and as much noise as sigma says.

    This holds between the two stages of a step too, where an inpainted row puts its kept half back, and the last line
    ends with the picture alone.
    """
    # Leading is the only spacing whose next timestep is DDIM's and PNDM's own.
    schedule = NoiseSchedule(set_alpha_to_one=True)
    for steps in (2, 12, 40):
        table = step_table(sampler, schedule, steps)
        state = np.zeros((SLOTS, 2 + len(table)))  # parts of the picture, of the first noise, and of each drawn one
        # Where a latent starts as noise alone it lacks its part of the picture: start here as img2img does.
        state[0, :2] = table.init_image_scale, table.add_noise_scale
        for i, (line, mix) in enumerate(zip(table.lines, table.mix, strict=True)):
            picture = np.eye(1, state.shape[1])
            state = mix @ np.concatenate([state[:1], picture, state[1:]])
            state[0, 2 + i] = line[Col.s]
            level = np.array([state[0, 0], np.linalg.norm(state[0, 1:])])
            # float64, except that LCM's function keeps up to 7e-6 of x itself.
            within = 1e-4 if sampler == "lcm" else 1e-8
            np.testing.assert_allclose(level, line[[Col.alpha_after, Col.sigma_after]], atol=within)
        assert (table.lines[-1, Col.alpha_after], table.lines[-1, Col.sigma_after]) == (1.0, 0.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_strength_that_leaves_no_step_makes_the_last_one(sampler: str) -> None:
    schedule = NoiseSchedule()
    small, last = step_table(sampler, schedule, 20, strength=0.01), step_table(sampler, schedule, 20, strength=0.05)
    assert len(small) == (2 if sampler == "pndm" else 1)
    assert np.array_equal(small.lines, last.lines) and np.array_equal(small.mix, last.mix)
    assert small.lines[-1, Col.t] == step_table(sampler, schedule, 20).lines[-1, Col.t]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", [*CONFIGS, *OTHER_BETAS])
def test_few_and_many_steps_are_a_finite_table(sampler: str, config: str) -> None:
    for prediction in ("epsilon", "v_prediction", "sample"):
        settings = {**CONFIGS, **OTHER_BETAS}[config] | {"prediction_type": prediction}
        schedule = NoiseSchedule.from_config(settings)
        for steps in (1, 2, 3, 33):
            assert_finite(step_table(sampler, schedule, steps), lines_of(sampler, steps))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_great_many_steps_are_a_finite_table(sampler: str) -> None:
    for steps in (333, 998) if sampler != "lcm" else (50,):
        assert_finite(step_table(sampler, NoiseSchedule(), steps), lines_of(sampler, steps))


def assert_finite(table: StepTable, lines: int) -> None:
    assert table.lines.shape == (lines, len(Col)) and table.mix.shape == (lines, SLOTS, SLOTS + 1)
    assert np.isfinite(table.lines).all() and np.isfinite(table.mix).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_line_reads_memory_that_was_not_written(sampler: str) -> None:
    for start in range(1, 11):
        written = np.zeros(SLOTS + 1, dtype=bool)
        written[:2] = True
        for mix in step_table(sampler, NoiseSchedule(), 10, strength=start / 10).mix:
            assert not mix[0, ~written].any()
            kept = np.array([bool(row.any()) and not row[~written].any() for row in mix[1:]])
            written = np.array([True, True, *kept])


def test_steps_that_the_schedule_cannot_lay_out_are_refused_by_name() -> None:
    """The reference fails here with an IndexError (timestep 1000), a NaN, or an error of its own."""
    refused = [("ddpm", 1000), ("ddim", 1000), ("pndm", 1000), ("dpmpp_2m", 999), ("unipc", 1000), ("euler", 1001)]
    for sampler, steps in [*refused, ("lcm", 51), ("lms", 1001), ("dpmpp_3m_sde", 1000)]:
        with pytest.raises(InvalidRequest, match=f"steps={steps}"):
            step_table(sampler, NoiseSchedule(), steps)


def test_noise_levels_that_coincide_are_refused_by_name() -> None:
    schedule = NoiseSchedule(trained_betas=(0.1, *(1e-9,) * 99), train_steps=100, steps_offset=0)
    for sampler in ("lms", "dpmpp_2m", "dpmpp_3m_sde", "unipc"):
        with pytest.raises(InvalidRequest, match="steps=20 is not allowed: too many for"):
            step_table(sampler, schedule, 20)


def test_an_unknown_sampler_is_refused_with_the_list() -> None:
    with pytest.raises(InvalidRequest, match=r"sampler='plms' is not allowed: one of ddpm, ddim, "):
        step_table("plms", NoiseSchedule(), 20)


@pytest.mark.parametrize("sampler", [sampler for sampler in SAMPLERS if sampler != "ddim"])
def test_an_eta_that_the_sampler_does_not_have_is_refused(sampler: str) -> None:
    with pytest.raises(InvalidRequest, match=f"eta=0.5 is not allowed: 0 with sampler {sampler}"):
        step_table(sampler, NoiseSchedule(), 20, eta=0.5)


def test_a_table_is_made_once_and_cannot_be_written() -> None:
    table = step_table("euler", NoiseSchedule(), 20)
    assert step_table("euler", NoiseSchedule(), 20) is table
    with pytest.raises(ValueError, match="read-only"):
        table.lines[0, Col.t] = 1
    with pytest.raises(ValueError, match="read-only"):
        table.mix[0, 0, 0] = 1
