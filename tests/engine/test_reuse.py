"""Deep features reused: DeepCache's picture, whatever happens around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_engine import Engine, Model, Request, load_model
from tests.engine.test_halving import SmallDevice
from tests.engine.test_packing import ONE_LEVEL

REQUEST = Request("red cat", seed=3, steps=6, sampler="euler_a", deepcache_interval=3, width=64, height=64)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


class Parts:
    """Counts which layers of a U-Net are called."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mid: list[int] = []
        self.last: list[int] = []
        for seen, layer in ((self.mid, model.unet.mid_block), (self.last, model.unet.conv_out)):
            forward = layer.forward

            def counted(x: Tensor, *rest: object, seen: list[int] = seen, forward: object = forward) -> Tensor:
                seen.append(len(x))
                return forward(x, *rest)  # type: ignore[operator, no-any-return]

            monkeypatch.setattr(layer, "forward", counted)


def test_only_every_third_step_computes_more_than_the_last_block(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(model, monkeypatch)
    Engine(model).render([REQUEST, replace(REQUEST, seed=4, sampler="ddim", guidance=None)])
    assert parts.mid == [3, 3] and parts.last == [3] * 6


@torch.inference_mode()
def test_parted_is_the_whole_unet_and_its_features_are_all_that_its_end_needs(model: Model) -> None:
    unet, x, t = model.unet, torch.randn(2, 4, 8, 8), torch.tensor([900.0, 20.0])
    texts = torch.randn(2, 77, unet.config.context_width)
    whole, deep = unet.parted(x, t, texts)
    assert torch.equal(whole, unet(x, t, texts))
    assert torch.equal(unet.parted(x, t, texts, deep)[0], whole)
    assert not torch.equal(unet.parted(x, t, texts, deep + 1)[0], whole)


def test_the_picture_is_near_the_exact_one_and_another(model: Model) -> None:
    reused, exact = Engine(model).render([REQUEST, replace(REQUEST, deepcache_interval=1)])
    assert not np.array_equal(reused, exact)


def test_halves_of_a_pack_that_did_not_fit_reuse_their_own(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [replace(REQUEST, seed=seed) for seed in range(4)]
    alone = [Engine(model).render([request])[0] for request in requests]
    device = SmallDevice(model.unet, fits=4)
    parted = model.unet.parted

    def small(x: Tensor, t: Tensor, context: object, deep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if len(x) > device.fits:
            device.refused.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return parted(x, t, context, deep)  # type: ignore[arg-type]

    monkeypatch.setattr(model.unet, "parted", small)
    for picture, wanted in zip(Engine(model).render(requests), alone, strict=True):
        assert np.abs(picture.astype(int) - wanted.astype(int)).max() <= ONE_LEVEL
    assert device.refused == [8]


def test_a_shallow_step_that_fails_is_made_again_from_the_same_features(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wanted,) = Engine(model).render([REQUEST])
    engine = Engine(model)
    id = engine.add(REQUEST)
    engine.step()
    row = engine._rows[id]
    assert row.kept is not None and row.noise is not None
    kept, draw = row.kept, row.noise.draw

    def fails(shape: tuple[int, ...]) -> Tensor:
        raise torch.OutOfMemoryError("no room for the noise")

    with monkeypatch.context() as patch:
        patch.setattr(row.noise, "draw", fails)
        engine.runner.denoise([row], lambda rows: None)
    assert (row.step, row.kept, row.noise.draw) == (1, kept, draw)
    row.error = None
    (ended,) = [ended for _ in range(5) for ended in engine.step()]
    assert np.array_equal(ended.image, wanted)  # type: ignore[arg-type]


def test_what_was_kept_is_given_back_with_the_last_step_that_needs_it(model: Model) -> None:
    engine = Engine(model)
    id = engine.add(REQUEST)
    kept = []
    for _ in range(5):
        engine.step()
        kept.append(engine._rows[id].kept is not None)
    assert kept == [True, True, False, True, True]
    engine.cancel(id)
    engine.step()
    assert engine.idle
