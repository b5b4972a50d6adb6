"""Each sampler's table beside the reference's scheduler object of diffusers, line by line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

from sd_engine.samplers import SAMPLERS, Col, step_table
from sd_engine.schedules import NoiseSchedule
from tests.engine.sampler_ways import (
    CONFIGS,
    NO_SAMPLE,
    OTHER_BETAS,
    RELATIVE,
    SD15_FILE,
    assert_same_steps,
    assert_same_timestep,
    assert_same_way,
    base,
    latent_of_a_picture,
    reference,
    reference_way,
    table_way,
)

# diffusers 0.42 turns its sigmas into numpy in two ways that numpy 2 warns of; nothing of ours does.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

# Published without a class in the reference, or (3M SDE) with one that differs: see test_samplers_published.py.
REFERENCED = tuple(sampler for sampler in SAMPLERS if base(sampler) not in ("dpmpp_2s_a", "dpmpp_3m_sde"))

# prediction -> (steps, strength)
RUNS: dict[str, tuple[tuple[int, float | None], ...]] = {
    "epsilon": ((4, None), (20, None), (50, None), (20, 0.3), (20, 1.0)),
    "v_prediction": ((4, None), (20, None), (50, None), (9, 0.75)),  # 6.75 steps: cut off to 6
    "sample": ((4, None), (20, 0.5)),
}


# Cosine betas start at sigma 2e4, zero SNR at 4e3: there the float32 of the reference loses two to four digits more.
WITHIN = {"linear": RELATIVE, "cosine": 1e-3, "zero snr": 1e-4}
# The class finds sigma_down as the root of a difference of squares, in float32: from such sigmas nothing is left.
# test_samplers_published.py holds dpm2_a to the formula there.
LOST = {("dpm2_a", "cosine"), ("dpm2_a", "zero snr")}


def predictions(sampler: str) -> list[str]:
    """A spread changes the noise levels alone, so the plain samplers show what a model may predict."""
    return ["epsilon", "v_prediction"] + ["sample"] * (sampler == base(sampler) and sampler not in NO_SAMPLE)


@pytest.mark.parametrize("config", ["sd15 leading", "sd15 linspace", "mini trailing"])
@pytest.mark.parametrize("sampler", REFERENCED)
def test_every_line_is_the_references(sampler: str, config: str) -> None:
    for prediction in predictions(sampler):
        for steps, strength in RUNS[prediction]:
            assert_same_way(sampler, {**CONFIGS[config], "prediction_type": prediction}, steps, strength)


@pytest.mark.parametrize(
    ("sampler", "betas"), [(s, betas) for s in REFERENCED for betas in OTHER_BETAS if (s, betas) not in LOST]
)
def test_other_betas_are_the_references(sampler: str, betas: str) -> None:
    within = WITHIN[betas]
    runs: dict[str, float | None] = {"v_prediction": None, "epsilon": 0.75}
    for prediction in ["v_prediction"] if betas == "zero snr" else runs:
        assert_same_way(sampler, {**OTHER_BETAS[betas], "prediction_type": prediction}, 20, runs[prediction], within)


@pytest.mark.parametrize("sampler", REFERENCED)
def test_a_real_folders_file_means_what_the_reference_makes_of_it(sampler: str) -> None:
    """The reference loads the file as the class that it names, then turns that into the sampler's class."""
    loaded: dict[str, Any] = dict(PNDMScheduler.from_config(dict(SD15_FILE)).config)
    table = step_table(sampler, NoiseSchedule.from_config(SD15_FILE), 20)
    for found, wanted in zip(table.lines[:, Col.t], reference(sampler, loaded, 20).timesteps, strict=True):
        assert_same_timestep(sampler, found, float(wanted))
    assert_same_way(sampler, SD15_FILE, 20, None)


@pytest.mark.parametrize("config", ["sd15 leading", "sd15 linspace", "mini trailing"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta_is_the_references(config: str, eta: float) -> None:
    for prediction in ("epsilon", "v_prediction", "sample"):
        for steps, strength in ((4, None), (20, None), (50, None), (20, 0.75)):
            assert_same_way("ddim", {**CONFIGS[config], "prediction_type": prediction}, steps, strength, eta=eta)


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_sde_karras"])
def test_dpmpp_sde_is_the_references_on_its_own_brownian_tree(sampler: str) -> None:
    """The tree's increments over the two parts of each step are independent; ours are drawn so."""
    steps = 12
    scheduler = reference(sampler, CONFIGS["sd15 leading"], steps)
    tree: Any = BrownianTreeNoiseSampler(latent_of_a_picture(), 0.02, 20.0, seed=5)
    parts: list[tuple[float, torch.Tensor]] = []
    draws: list[torch.Tensor] = []

    def recorded(now: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        whole: torch.Tensor = tree(now, after)
        if not parts:
            parts.append((float(after), whole))
            draws.append(whole)
            return whole
        between, first = parts.pop()
        left = whole * (float(now) - float(after)) ** 0.5 - first * (float(now) - between) ** 0.5
        draws.append(left / (between - float(after)) ** 0.5)
        return whole

    way = reference_way(scheduler, steps, None, torch.Generator().manual_seed(7))
    wanted = [next(way)]
    scheduler.noise_sampler = recorded
    wanted += way
    table = step_table(sampler, NoiseSchedule.from_config(CONFIGS["sd15 leading"]), steps)
    found = list(table_way(table, None, torch.Generator().manual_seed(7), iter(draws)))
    # The second increment is a difference of two that the tree gives in float32.
    assert_same_steps(sampler, found, wanted, 1e-4, "the tree")
