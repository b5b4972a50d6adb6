"""Same seed, same picture: what of an image its neighbours can change (its last bits), and what never (its noise)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_engine import Engine, Model, Request, load_model, noise, runner
from sd_engine.config import UNetConfig
from sd_engine.context import Context, PackContext, join
from sd_engine.engine import DETERMINISTIC_UNET_ROWS
from sd_engine.noise import NoiseSource
from sd_engine.unet import UNet
from tests.engine.half import cpu_with_units
from tests.engine.test_packing import ONE_LEVEL, POOL, VISITS, Pixels, Visit, ticks

# bfloat16 keeps 8 bits of a number: a picture's own rounding in it is about 3 levels of 256, and another order of
# addition moves values by as much; over some steps it grows. README states this number.
BFLOAT16_LEVELS = 16
TOLERANCE = {torch.float32: ONE_LEVEL, torch.bfloat16: BFLOAT16_LEVELS}


# Few CPUs compute in bfloat16; the others imitate it, twenty times as slowly: there, a part of the pool must do.
POOLS = {torch.float32: POOL, torch.bfloat16: POOL[:6]}


class Alone:
    """Each picture of the pool as it is when drawn by itself."""

    def __init__(self, model: Model, *, deterministic: bool) -> None:
        self._model, self._deterministic = model, deterministic
        self._pictures: dict[int, Pixels] = {}

    def __getitem__(self, place: int) -> Pixels:
        if place not in self._pictures:
            engine = Engine(self._model, deterministic=self._deterministic)
            self._pictures[place] = engine.render([POOL[place]])[0]
        return self._pictures[place]


@pytest.fixture(scope="module", params=POOLS, ids=str)
def model(tiny_folder: Path, request: pytest.FixtureRequest) -> Model:
    with cpu_with_units():
        return load_model(tiny_folder, dtype=request.param)


@pytest.fixture(scope="module")
def alone(model: Model) -> Alone:
    return Alone(model, deterministic=False)


@pytest.fixture(scope="module")
def alone_deterministic(model: Model) -> Alone:
    return Alone(model, deterministic=True)


def of_pool(visits: list[Visit], dtype: torch.dtype) -> list[Visit]:
    """The same visits by requests of the dtype's pool."""
    return [replace(visit, request=visit.request % len(POOLS[dtype])) for visit in visits]


@settings(max_examples=5, deadline=None)
@given(visits=st.lists(VISITS, min_size=2, max_size=9))
def test_the_pixels_agree_within_the_stated_number_whatever_the_neighbours(
    model: Model, alone: Alone, visits: list[Visit]
) -> None:
    visits = of_pool(visits, model.dtype)
    for i, ending in ticks(Engine(model), visits).items():
        if isinstance(ending, np.ndarray):
            difference = np.abs(ending.astype(int) - alone[visits[i].request].astype(int)).max()
            assert difference <= TOLERANCE[model.dtype], POOL[visits[i].request]


@settings(max_examples=5, deadline=None)
@given(visits=st.lists(VISITS, min_size=2, max_size=9))
def test_deterministic_pixels_are_bitwise_the_same_whatever_the_neighbours(
    model: Model, alone_deterministic: Alone, visits: list[Visit]
) -> None:
    visits = of_pool(visits, model.dtype)
    for i, ending in ticks(Engine(model, deterministic=True), visits).items():
        if isinstance(ending, np.ndarray):
            assert np.array_equal(ending, alone_deterministic[visits[i].request]), POOL[visits[i].request]


def test_a_smaller_limit_is_a_smaller_bucket_of_the_same_promise(model: Model) -> None:
    together = Engine(model, deterministic=True, max_units=4 * 64).render(POOL[:4])
    for picture, request in zip(together, POOL[:4], strict=True):
        assert np.array_equal(picture, Engine(model, deterministic=True, max_units=4 * 64).render([request])[0])


@pytest.fixture
def six_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("six_threads")
def test_deterministic_pixels_do_not_depend_on_how_threads_share_the_work_out(tiny_folder: Path) -> None:
    """Six cut a pack of eight U-Net rows in the midst of a row: without care two of these pictures differ."""
    model = load_model(tiny_folder)
    requests = [replace(POOL[i % 4], seed=i, steps=6, sampler="euler") for i in range(6)]
    together = Engine(model, deterministic=True).render(requests)
    for picture, request in zip(together, requests, strict=True):
        assert np.array_equal(picture, Engine(model, deterministic=True).render([request])[0])
    assert torch.get_num_threads() == 6, "they are given back"


def test_deterministic_packs_are_shared_and_padded_and_their_rows_attend_apart(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[int]] = []
    forward = model.unet.forward

    def recorded(x: Tensor, t: Tensor, context: PackContext) -> Tensor:
        assert len(x) == len(t)
        calls.append([len(run) for run in context.runs])
        return forward(x, t, context)

    monkeypatch.setattr(model.unet, "forward", recorded)
    Engine(model, deterministic=True).render(POOL[:2])
    assert calls == [[1] * DETERMINISTIC_UNET_ROWS] * max(request.steps for request in POOL[:2])


@torch.inference_mode()
def test_apart_a_rows_bits_do_not_depend_on_the_length_of_the_neighbours_prompts() -> None:
    """Four levels at 64 x 64 pixels: its one position at the coarsest may round by the rows of its call."""
    torch.manual_seed(0)
    config = UNetConfig(
        channels=(16, 32, 32, 32), attention=(True,) * 4, heads=(2,) * 4, context_width=24, norm_groups=8
    )
    unet = UNet(config).eval()
    own, short, long = (unet.context(torch.randn(tokens, 24)) for tokens in (77, 77, 154))
    x, t = torch.randn(8, 4, 8, 8), torch.full((8,), 500.0)

    def drawn(neighbours: list[Context]) -> Tensor:
        prediction: Tensor = unet(x, t, join([own, *neighbours], apart=True))
        return prediction[0]

    lengths = [[short] * 7, [short] * 3 + [long] * 4, [long] * 7]
    predictions = [drawn(neighbours) for neighbours in lengths]
    assert all(torch.equal(prediction, predictions[0]) for prediction in predictions)


class Recorded:
    """A source of noise that keeps what was drawn from it."""

    def __init__(self, source: NoiseSource) -> None:
        self._source = source
        self.drawn: list[Tensor] = []

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        self.drawn.append(self._source.draw(shape))
        return self.drawn[-1]

    def state(self) -> Tensor:
        return self._source.state()

    def set_state(self, state: Tensor) -> None:
        self._source.set_state(state)


def draws(model: Model, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """Every draw of every request, in order, by its place in the list."""
    recorded: list[tuple[int, Recorded]] = []
    make = noise.noise_source

    def recording(kind: str, seed: int) -> Recorded:
        recorded.append((seed, Recorded(make(kind, seed))))  # type: ignore[arg-type]
        return recorded[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(runner, "noise_source", recording)
        Engine(model, max_units=600).render(requests)
    return {seed: source.drawn for seed, source in recorded}


def test_every_draw_of_an_image_is_bitwise_the_same_whatever_its_neighbours(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = POOLS[model.dtype]
    together = draws(model, list(reversed(pool)), monkeypatch)
    for request in pool:
        (by_itself,) = draws(model, [request], monkeypatch).values()
        assert len(by_itself) == len(together[request.seed]) > 0
        for one, other in zip(by_itself, together[request.seed], strict=True):
            assert one.device.type == "cpu" and one.dtype == torch.float32, "so that no device can change it"
            assert torch.equal(one, other)
