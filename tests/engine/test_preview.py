"""Previews: soon like the picture, and no part of it."""

from __future__ import annotations

import numpy as np
import pytest

from sd_engine import Engine, Model, Request, load_model, shipped_model
from sd_engine.preview import fitted

REQUEST = Request("a large red star on a blue background", seed=7, steps=6, guidance=4.0)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(shipped_model(), "cpu", "fp32")


def test_a_preview_grows_into_the_picture_and_changes_none_of_it(model: Model) -> None:
    (wanted,) = Engine(model).render([REQUEST])
    engine = Engine(model)
    id = engine.add(REQUEST)
    assert engine.preview(id) is None, "nothing has been drawn yet"
    previews = []
    for _ in range(REQUEST.steps - 1):
        assert engine.step() == []
        preview = engine.preview(id)
        assert preview is not None and preview.dtype == np.uint8
        previews.append(preview.astype(int))
    (ended,) = engine.step()
    assert ended.image is not None and np.array_equal(ended.image, wanted)
    height, width = (side // model.factor for side in wanted.shape[:2])
    cells = wanted.reshape(height, model.factor, width, model.factor, 3).mean((1, 3))
    away = [float(np.abs(preview - cells).mean()) for preview in previews]
    # A linear map is a rough guess: 40 of 256 levels off over many pictures, where their mean colour is 82 off.
    assert previews[0].shape == cells.shape and away[-1] < 45 and away[-1] < away[0]
    with pytest.raises(KeyError):
        engine.preview(id)


def test_a_models_map_is_always_the_same(model: Model) -> None:
    first = fitted(model)
    assert first.shape == (model.latent_channels + 1, 3)
    assert np.allclose(first, fitted(model), rtol=0, atol=1e-6)
