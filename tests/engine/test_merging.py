"""Token merging: what is merged, what comes back, and that rows of another ratio are not touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_engine import Engine, Model, Request, load_model
from sd_engine.merging import Merging
from sd_engine.request import MAX_TOKEN_MERGING_RATIO

REQUEST = Request("red cat", seed=3, steps=4, sampler="ddim", width=96, height=64)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


def tokens_of(merging: Merging, x: Tensor) -> Tensor:
    """What the attention sees."""
    seen: list[Tensor] = []

    def attention(merged: Tensor) -> Tensor:
        seen.append(merged)
        return merged

    merging.around(attention, x)
    return seen[0]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1), (1, 4)])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, MAX_TOKEN_MERGING_RATIO])
def test_so_many_tokens_are_merged_away_and_all_positions_come_back(height: int, width: int, ratio: float) -> None:
    x = torch.randn(2, height * width, 8)
    merging = Merging(ratio, height, width)
    destinations = -(-height // 2) * -(-width // 2)
    left = max(height * width - int(ratio * height * width), destinations)
    assert tokens_of(merging, x).shape == (2, left, 8)
    assert merging.around(lambda merged: merged, x).shape == x.shape


def test_merged_with_nothing_every_position_attends_as_itself() -> None:
    x = torch.randn(2, 24, 8)
    assert torch.equal(Merging(0.0, 4, 6).around(lambda merged: merged * 2, x), x * 2)


def test_the_most_alike_are_merged_into_their_mean() -> None:
    x = torch.eye(8)[None, :4] + 0.0
    x[0, 3] = 3 * x[0, 0]  # the same direction as the one destination of this square
    out = Merging(0.25, 2, 2).around(lambda merged: merged, x)
    assert torch.equal(out[0, 0], 2 * x[0, 0]) and torch.equal(out[0, 3], 2 * x[0, 0])
    assert torch.equal(out[0, 1:3], x[0, 1:3])


def test_what_is_alike_everywhere_attends_as_without_merging(model: Model) -> None:
    """Positions that are equal have equal results: merging them changes only rounding."""
    attention = model.unet.blocks[0].attn1
    x = torch.randn(2, 1, attention.to_q.in_features).repeat(1, 24, 1)
    with torch.inference_mode():
        assert torch.allclose(Merging(0.5, 4, 6).around(attention, x), attention(x), atol=1e-5)


def test_a_rows_tokens_do_not_depend_on_its_neighbours() -> None:
    x = torch.randn(5, 24, 8)
    merging = Merging(0.5, 4, 6)
    assert torch.equal(tokens_of(merging, x)[2:3], tokens_of(merging, x[2:3]))


def test_rows_of_another_ratio_are_in_another_call_and_keep_their_bits(model: Model) -> None:
    merged = replace(REQUEST, token_merging_ratio=0.5)
    alone = [Engine(model).render([request])[0] for request in (REQUEST, merged)]
    engine = Engine(model)
    together = engine.render([REQUEST, merged])
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@torch.inference_mode()
def test_only_the_finest_level_that_attends_is_merged(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    for block in model.unet.blocks:
        forward = block.attn1.forward

        def counted(x: Tensor, forward: object = forward) -> Tensor:
            counts.append(x.shape[1])
            return forward(x)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(block.attn1, "forward", counted)
    Engine(model).render([replace(REQUEST, steps=1)])
    whole, counts[:] = list(counts), []
    Engine(model).render([replace(REQUEST, steps=1, token_merging_ratio=0.5)])
    assert counts == [n // 2 if n == max(whole) else n for n in whole]
