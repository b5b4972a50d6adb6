"""A row that was saved goes on exactly where it was, in whatever engine: its picture is the same, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_engine import SAMPLERS, Engine, Model, Request, load_model
from tests.engine.test_packing import INIT, MASK, POOL, Pixels
from tests.tiny_model import make_tiny_model

SMALL = replace(POOL[0], steps=4)

# Where the passes, the masks and the draws meet: what is prepared again must be what was prepared before.
HARD = (
    replace(SMALL, upscale=1.5, sampler="ddpm", init_image=INIT, mask=MASK),
    replace(SMALL, upscale=1.5, sampler="euler_a", upscale_by="pixel", init_image=INIT, mask=MASK, mask_blur=2.0),
    replace(SMALL, upscale=1.5, sampler="dpmpp_sde", upscale_by="pixel", noise="cuda"),
    replace(SMALL, upscale=1.5, sampler="unipc", guidance=None),
    replace(SMALL, sampler="euler_a", init_image=INIT, mask=MASK, strength=1.0),
)


@pytest.fixture(scope="module")
def models(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Model]:
    """By the U-Net's channels: 4 is an ordinary one, 9 one for inpainting."""
    nine = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", in_channels=9)
    return {4: load_model(tiny_folder), 9: load_model(nine)}


@pytest.fixture(scope="module")
def model(models: Mapping[int, Model]) -> Model:
    return models[4]


def undisturbed(model: Model, request: Request) -> Pixels:
    return Engine(model).render([request])[0]


def finished(engine: Engine) -> list[Pixels]:
    """What is in flight, drawn to its end."""
    endings = []
    while not engine.idle:
        endings += engine.step()
    assert not any(ended.error for ended in endings), endings
    return [ended.image for ended in endings if ended.image is not None]


def carried_on(model: Model, request: Request) -> tuple[Pixels, int]:
    """The picture of a row that changes its engine after every step (or whole step), and how often it did."""
    saved, hops = b"", 0
    while True:
        engine = Engine(model)
        id = engine.add(request, saved)
        assert engine.progress(id)[0] >= min(hops, 1), "it begins again"
        for _ in range(request.deepcache_interval):  # what is between two whole steps is made again
            for ended in engine.step():
                assert ended.image is not None, ended.error
                return ended.image, hops
        saved, hops = engine.save(id), hops + 1


SOURCES = [(sampler, "cpu") for sampler in SAMPLERS] + [("euler_a", "cuda"), ("dpmpp_3m_sde", "cuda")]


@pytest.mark.parametrize(("sampler", "noise"), SOURCES)
def test_every_sampler_goes_on_after_each_of_its_steps(model: Model, sampler: str, noise: str) -> None:
    request = replace(SMALL, sampler=sampler, noise=noise)  # type: ignore[arg-type]
    picture, hops = carried_on(model, request)
    assert hops >= 3 and np.array_equal(picture, undisturbed(model, request))


@pytest.mark.parametrize("place", range(len(POOL)))
def test_every_kind_of_request_goes_on_after_each_of_its_steps(model: Model, place: int) -> None:
    assert np.array_equal(carried_on(model, POOL[place])[0], undisturbed(model, POOL[place]))


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("place", range(len(HARD)))
def test_masks_and_both_passes_go_on_with_either_kind_of_unet(
    models: Mapping[int, Model], channels: int, place: int
) -> None:
    request, model = HARD[place], models[channels]
    assert np.array_equal(carried_on(model, request)[0], undisturbed(model, request))


@settings(max_examples=12, deadline=None)
@given(
    places=st.lists(st.integers(0, len(POOL) - 1), min_size=1, max_size=4),
    moments=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    neighbour=st.integers(0, len(POOL) - 1),
)
def test_rows_go_on_whenever_they_are_interrupted_and_whoever_is_beside_them(
    model: Model, places: list[int], moments: list[int], neighbour: int
) -> None:
    """In packs of a fixed size, where neighbours cannot change a bit. Each move is into a new engine with others."""
    saved: dict[int, bytes] = dict.fromkeys(range(len(places)), b"")
    pictures: dict[int, Pixels] = {}
    for steps in [*moments, 500]:
        engine = Engine(model, deterministic=True)
        engine.add(POOL[neighbour])
        ids = {engine.add(POOL[places[i]], data): i for i, data in saved.items()}
        for _ in range(steps):
            done = {ids[ended.id]: ended.image for ended in engine.step() if ended.id in ids}
            pictures |= {i: image for i, image in done.items() if image is not None}
            if engine.idle:
                break
        saved = {i: engine.save(id) for id, i in ids.items() if i not in pictures}
    assert not saved
    for i, picture in pictures.items():
        (alone,) = Engine(model, deterministic=True).render([POOL[places[i]]])
        assert np.array_equal(picture, alone), POOL[places[i]]


def test_a_row_that_reuses_deep_features_goes_back_to_its_last_whole_step_and_is_no_larger_for_them(
    model: Model,
) -> None:
    request = replace(SMALL, steps=8, sampler="euler_a", deepcache_interval=4)
    engine = Engine(model)
    id = engine.add(request)
    for steps in range(1, 8):
        engine.step()
        saved = engine.save(id)
        assert len(saved) < 4 * 4 * 8 * 8 + 6 * 1024 + 512, "features were saved"
        other = Engine(model)
        assert other.progress(other.add(request, saved))[0] == steps - steps % 4
        assert np.array_equal(finished(other)[0], undisturbed(model, request))
    assert engine.progress(id) == (7, 8), "the row itself loses nothing"


def test_a_row_that_has_not_begun_is_saved_as_nothing_and_begins(model: Model) -> None:
    engine = Engine(model)
    saved = engine.save(engine.add(SMALL))
    assert saved == b""
    id = (other := Engine(model)).add(SMALL, saved)
    assert other.progress(id) == (0, 4)


def test_a_row_that_came_saved_and_has_not_moved_is_saved_as_it_came(model: Model) -> None:
    engine = Engine(model)
    id = engine.add(SMALL)
    engine.step()
    saved = engine.save(id)
    other = Engine(model)
    again = other.save(other.add(SMALL, saved))
    assert len(again) == len(saved) and again[-5000:] == saved[-5000:]  # the header's words have no order
    assert np.array_equal(finished(other)[0], undisturbed(model, SMALL))


def test_a_draw_for_a_step_that_has_not_succeeded_is_not_drawn_again(model: Model) -> None:
    request = replace(SMALL, sampler="euler_a")
    engine = Engine(model)
    id = engine.add(request)
    engine.step()
    row = engine._rows[id]
    assert row.noise is not None and row.latent is not None
    row.drawn = row.noise.draw(tuple(row.latent.shape))  # as a step leaves it that failed after its draw
    other = Engine(model)
    other.add(request, engine.save(id))
    assert np.array_equal(finished(other)[0], undisturbed(model, request))


@pytest.mark.parametrize(("sampler", "latents"), [("ddim", 1), ("euler_a", 1), ("dpmpp_2m_karras", 2), ("unipc", 4)])
def test_at_512_a_saved_row_is_its_latents_and_six_kilobytes(model: Model, sampler: str, latents: int) -> None:
    """A latent of SD 1.x is 4 x 64 x 64 numbers, 64 KB. Memory is kept only where a later line reads it."""
    engine = Engine(model)
    id = engine.add(Request("red cat", sampler=sampler, steps=8, guidance=None, width=512, height=512))
    for _ in range(4):
        engine.step()
    size = len(engine.save(id))
    assert latents * 65536 < size <= latents * 65536 + 6 * 1024, size


def test_a_model_s_fingerprint_is_of_its_configuration_and_its_weights_and_of_no_dtype(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_folder)
    assert model.fingerprint == load_model(tiny_folder, dtype=torch.bfloat16).fingerprint
    others = [load_model(make_tiny_model(tmp_path / "seed", seed=1))]
    others += [load_model(make_tiny_model(tmp_path / "v", prediction="v_prediction"))]
    weight: Tensor = model.unet.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0] *= -1
    assert len({load_model(tiny_folder).fingerprint, model.fingerprint, *(other.fingerprint for other in others)}) == 4


def test_the_slots_that_a_table_still_reads_are_all_that_change_what_comes(model: Model) -> None:
    """Rubbish in any other slot changes nothing: it is not even saved."""
    for sampler in ("dpmpp_2m", "heun", "pndm", "lms", "unipc", "dpmpp_3m_sde"):
        request = replace(SMALL, sampler=sampler, steps=5)
        engine = Engine(model)
        id = engine.add(request)
        for _ in range(3):
            engine.step()
        row = engine._rows[id]
        assert row.state is not None
        spoiled = row.state.clone()
        dead = [slot for slot in range(len(spoiled)) if slot not in row.table.live(row.step)]
        spoiled[dead] = 1e3
        row.state = spoiled
        assert dead and np.array_equal(finished(engine)[0], undisturbed(model, request)), sampler
