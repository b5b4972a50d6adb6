"""The packing promise: whatever shares a U-Net call with an image, the image is the one that is rendered alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_engine import SAMPLERS, Cancelled, Engine, Finished, InvalidRequest, Model, Request, load_model
from sd_engine.context import PackContext
from sd_engine.devices import default_max_units
from sd_engine.samplers import Col, step_table
from tests.tiny_model import make_tiny_model

Pixels = npt.NDArray[np.uint8]

# Kernels add in another order for another batch size, so float32 results differ in their last bits, and a value that
# falls next to the middle between two of the 256 levels may then round the other way: one level, never two.
ONE_LEVEL = 1

INIT = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
MASK = np.where(np.arange(96) < 40, 255, 0).astype(np.uint8) * np.ones((64, 1), np.uint8)

# Different in everything that a pack may mix; three lanes (sizes).
POOL = (
    Request("red cat", seed=1, steps=3, guidance=7.5, sampler="ddim", width=64, height=64),
    Request("cat", seed=2, steps=5, guidance=None, sampler="euler_a", width=64, height=64),
    Request("", negative_prompt="red", seed=3, steps=2, guidance=3.0, sampler="ddpm", width=64, height=64),
    Request("a cat at", seed=4, steps=6, guidance=1.0, sampler="dpmpp_2m_karras", width=64, height=64),
    Request("red", seed=5, steps=4, guidance=12.0, sampler="euler_karras", width=64, height=64, init_image=INIT),
    Request("red at", seed=6, steps=8, guidance=5.0, sampler="dpmpp_2m", init_image=INIT, strength=0.4),
    Request("cat cat", seed=7, steps=3, guidance=4.0, sampler="euler", width=96, height=64),
    Request("at", seed=8, steps=5, guidance=None, sampler="euler_a_karras", init_image=INIT, strength=0.9),
    Request("red", seed=9, steps=4, guidance=2.0, sampler="ddim", width=64, height=104),
    # Every other sampler once, spread over the three ways to lay its noise levels out.
    Request("cat", seed=10, steps=3, guidance=3.0, sampler="ddim", eta=0.7, width=64, height=64),
    Request("a red", seed=11, steps=5, guidance=5.0, sampler="pndm", width=64, height=64),
    Request("red cat", seed=12, steps=4, guidance=None, sampler="lcm", width=64, height=64),
    Request("cat", seed=13, steps=5, guidance=6.0, sampler="lms_karras", width=64, height=64),
    Request("red", seed=14, steps=3, guidance=2.5, sampler="heun_exponential", width=64, height=64),
    Request("at", seed=15, steps=3, guidance=None, sampler="dpm2", width=64, height=64),
    Request("cat at", seed=16, steps=4, guidance=4.0, sampler="dpm2_a_karras", init_image=INIT, strength=0.8),
    Request("red", seed=17, steps=4, guidance=3.0, sampler="dpmpp_2m_sde_exponential", width=64, height=64),
    Request("a cat", seed=18, steps=3, guidance=7.0, sampler="dpmpp_sde", width=64, height=64),
    Request("cat", seed=19, steps=3, guidance=None, sampler="dpmpp_2s_a_karras", width=64, height=64),
    Request("red red", seed=20, steps=5, guidance=3.5, sampler="dpmpp_3m_sde", width=64, height=64, noise="cuda"),
    Request("at", seed=21, steps=5, guidance=5.0, sampler="unipc_karras", init_image=INIT, strength=0.7),
    # Every other feature of a request: masks, second passes, long and weighted prompts, layers and deviations.
    Request("red", seed=22, steps=4, guidance=4.0, sampler="ddim", init_image=INIT, mask=MASK, strength=0.9),
    Request("cat", seed=23, steps=3, guidance=None, sampler="euler", init_image=INIT, mask=MASK, mask_blur=4.0),
    Request("red", seed=24, steps=3, guidance=3.0, sampler="euler_a", width=64, height=64, upscale=1.5),
    Request(
        "cat", seed=25, steps=2, guidance=None, sampler="heun", width=64, height=64, upscale=1.5, upscale_by="pixel"
    ),
    Request("a red cat at " * 30, seed=26, steps=3, guidance=5.0, sampler="ddpm", width=64, height=64),
    Request("(red:1.4) BREAK [cat]", seed=27, steps=3, guidance=5.0, sampler="ddim", width=64, height=64, clip_skip=2),
    # Every choice that makes another picture.
    Request("red", seed=29, steps=8, guidance=6.0, guidance_start=0.25, guidance_stop=0.7, width=64, height=64),
    Request("red", seed=30, steps=7, deepcache_interval=3, sampler="euler_a", guidance_stop=0.6, width=64, height=64),
    Request("at", seed=31, steps=5, deepcache_interval=2, guidance_start=0.5, sampler="heun", width=64, height=64),
    Request("cat", seed=32, steps=4, deepcache_interval=2, guidance=None, sampler="dpmpp_2m", init_image=INIT),
    Request("red", seed=33, steps=3, token_merging_ratio=0.5, sampler="euler", width=64, height=64),
    Request("cat", seed=28, steps=3, guidance=9.0, guidance_rescale=0.7, sampler="euler", width=64, height=64),
)


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of the pool: when it comes, and at which tick it is cancelled, if at all."""

    request: int
    arrives: int
    cancelled: int | None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    make_tiny_model(folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[Pixels]:
    return [Engine(model).render([request])[0] for request in POOL]


def ticks(engine: Engine, visits: list[Visit]) -> dict[int, Pixels | Exception]:
    """Drive an engine through all arrivals and cancels; visit -> what its request ended with."""
    ids: dict[int, int] = {}
    endings: dict[int, Pixels | Exception] = {}
    tick = 0
    while len(endings) < len(visits):
        for i, visit in enumerate(visits):
            if visit.arrives == tick:
                ids[engine.add(POOL[visit.request])] = i
            if visit.cancelled == tick and visit.arrives <= tick:
                engine.cancel(next(id for id, of in ids.items() if of == i))
        for finished in engine.step():
            assert ids[finished.id] not in endings, "a request ended twice"
            ending = finished.image if finished.error is None else finished.error
            assert ending is not None
            endings[ids[finished.id]] = ending
        engine.packer.check()
        tick += 1
        assert tick < 500, "the engine makes no progress"
    assert engine.idle
    return endings


VISITS = st.builds(
    Visit,
    request=st.integers(0, len(POOL) - 1),
    arrives=st.integers(0, 6),
    cancelled=st.one_of(st.none(), st.none(), st.integers(0, 10)),
)


@settings(max_examples=25, deadline=None)
@given(visits=st.lists(VISITS, min_size=1, max_size=9), max_units=st.sampled_from([64, 300, 10_000]))
def test_any_mix_of_requests_arrivals_and_cancels_draws_each_image_as_if_alone(
    model: Model, alone: list[Pixels], visits: list[Visit], max_units: int
) -> None:
    endings = ticks(Engine(model, max_units=max_units), visits)
    for i, visit in enumerate(visits):
        ending = endings[i]
        if isinstance(ending, Exception):
            assert isinstance(ending, Cancelled) and visit.cancelled is not None, ending
        else:
            difference = np.abs(ending.astype(int) - alone[visit.request].astype(int)).max()
            assert difference <= ONE_LEVEL, f"{POOL[visit.request]}: {difference} levels"


def test_every_sampler_is_in_the_pool() -> None:
    """With one of its spreads: those differ in their numbers alone."""
    spreads = ("_karras", "_exponential")
    pooled = {request.sampler for request in POOL}
    bases = {sampler.removesuffix("_karras").removesuffix("_exponential") for sampler in pooled}
    assert bases == {sampler for sampler in SAMPLERS if not sampler.endswith(spreads)}
    assert all(any(sampler.endswith(spread) for sampler in pooled) for spread in spreads)


@pytest.fixture
def calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The U-Net rows of each call so far."""
    calls, forward = list[int](), model.unet.forward

    def counted(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return forward(x, t, context)

    monkeypatch.setattr(model.unet, "forward", counted)
    return calls


def test_different_requests_of_one_lane_share_one_unet_call(model: Model, calls: list[int]) -> None:
    engine = Engine(model)
    for request in POOL[:5]:
        engine.add(request)
    engine.step()
    # Guided rows take two U-Net rows, the unguided ones (guidance None and 1.0) take one.
    assert calls == [2 + 1 + 2 + 1 + 2]


def test_a_pack_on_a_cpu_is_by_default_no_larger_than_pays(model: Model, calls: list[int]) -> None:
    """Two guided pictures of 512 x 512 make a step; the third waits, or an urgent one would wait for all three."""
    engine = Engine(model)
    for seed in range(3):
        engine.add(Request("red cat", seed=seed, steps=2, guidance=7.5, width=512, height=512))
    engine.step()
    assert calls == [4]
    assert default_max_units(torch.device("cuda")) == 4 * default_max_units(torch.device("cpu"))


def test_a_deterministic_engine_pads_packs_of_512_to_four_guided_pictures(model: Model, calls: list[int]) -> None:
    """What decides the bits of a picture is the same on every device."""
    engine = Engine(model, deterministic=True)
    engine.add(Request("red cat", steps=2, guidance=7.5, width=512, height=512))
    engine.step()
    assert calls == [8]


def test_the_unet_is_told_each_rows_own_timesteps_and_their_fractions(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture hardly shows a fraction, so pictures beside the reference's would not miss one."""
    samplers = ("euler_karras", "dpm2_a_exponential")
    told: list[list[float]] = []
    forward = model.unet.forward

    def recorded(x: torch.Tensor, t: torch.Tensor, context: PackContext) -> torch.Tensor:
        told.append(t.tolist())
        return forward(x, t, context)

    monkeypatch.setattr(model.unet, "forward", recorded)
    Engine(model).render(
        [Request("cat", steps=3, guidance=None, sampler=sampler, width=64, height=64) for sampler in samplers]
    )
    euler, dpm2 = (step_table(sampler, model.schedule, 3).lines[:, Col.t].astype(np.float32) for sampler in samplers)
    assert told == [[euler[0], dpm2[0]], [euler[1], dpm2[1]], [euler[2], dpm2[2]], [dpm2[3]], [dpm2[4]]]
    assert any(euler % 1) and any(dpm2 % 1)


def test_neighbours_never_change_an_images_noise(model: Model) -> None:
    def first_latents(requests: tuple[Request, ...]) -> list[torch.Tensor]:
        engine = Engine(model)
        for request in requests:
            engine.add(request)
        rows = engine.packer.admit()
        engine.runner.prepare(rows)
        return [row.latent for row in rows if row.latent is not None]

    (by_itself,) = first_latents(POOL[:1])
    together = first_latents(POOL)
    assert torch.equal(by_itself, together[0])


def test_a_row_that_cannot_be_stepped_fails_alone(
    model: Model, alone: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    ids = [engine.add(request) for request in POOL[:5]]
    rows = engine.packer.admit()
    engine.runner.prepare(rows)
    rows[2].state = torch.zeros(5, 3, 8, 8)  # a channel too few: the whole pack's call fails at first
    endings: dict[int, Finished] = {}
    while not engine.idle:
        endings |= {finished.id: finished for finished in engine.step()}
    assert endings[ids[2]].error is not None
    for i in (0, 1, 3, 4):
        image = endings[ids[i]].image
        assert image is not None
        assert np.abs(image.astype(int) - alone[i].astype(int)).max() <= ONE_LEVEL


def test_a_picture_that_is_not_finite_fails_alone(model: Model) -> None:
    engine = Engine(model)
    ids = [engine.add(request) for request in POOL[:3]]
    rows = engine.packer.admit()
    engine.runner.prepare(rows)
    assert rows[1].state is not None
    rows[1].state = rows[1].state * float("nan")
    endings: dict[int, Finished] = {}
    while not engine.idle:
        endings |= {finished.id: finished for finished in engine.step()}
    assert [endings[id].error is None for id in ids] == [True, False, True]
    assert "finite" in str(endings[ids[1]].error)


def test_what_is_no_request_is_refused_in_a_sentence(model: Model) -> None:
    wrong: Any = "red cat"
    engine = Engine(model)
    with pytest.raises(InvalidRequest, match=r"request='str' is not allowed: an sd_engine.Request"):
        engine.add(wrong)
    assert engine.idle
    with pytest.raises(ValueError, match="max_units=0"):
        Engine(model, max_units=0)
