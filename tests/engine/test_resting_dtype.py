"""On a CPU without units for half precision, weights rest in it and are computed with in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sd_engine import Engine, Model, Request, layers, load_model
from sd_engine.convert import convert
from sd_engine.devices import computes, working_dtype
from sd_engine.layers import Conv3x3, Linear, lay_out_weights
from sd_engine.offload import OFFLOADS
from tests.engine.half import cpu_with_units, cpu_without_units
from tests.engine.prepacked import a_cpu_that_does_not_prepack

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
REQUESTS = [
    Request("a (red:1.2) my-word", seed=3, steps=3),
    Request("a star", seed=4, steps=3, init_image=np.full((64, 64, 3), 128, np.uint8), sampler="euler_a"),
]


@pytest.fixture
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model's weights are treated as a real one's: only those of norms, and biases, are small."""
    monkeypatch.setattr(layers, "_SMALLEST", 64)


@pytest.fixture(autouse=True)
def without_units() -> Iterator[None]:
    with cpu_without_units():
        yield


@HALVES
def test_only_a_cpu_without_units_works_in_another_dtype_than_weights_rest_in(dtype: torch.dtype) -> None:
    assert working_dtype(dtype, CPU) == torch.float32
    assert working_dtype(dtype, CUDA) == dtype
    assert working_dtype(torch.float32, CPU) == torch.float32
    with cpu_with_units():
        assert working_dtype(dtype, CPU) == dtype


def test_this_machine_says_what_it_computes() -> None:
    assert computes(torch.float32)
    assert {computes(torch.float16), computes(torch.bfloat16)} <= {True, False}


@HALVES
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.usefixtures("all_large")
def test_the_picture_is_that_of_the_same_weights_widened_when_they_were_loaded(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype, offload: str
) -> None:
    folder = convert(tiny_folder, tmp_path / "half", dtype)
    (folder / "embeddings").mkdir()
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))  # float32, and used as such
    save_file({"emb_params": vectors}, folder / "embeddings" / "my-word.safetensors")
    resting, widened = load_model(folder, dtype=dtype, offload=offload), load_model(folder, dtype="fp32")
    assert sizes(resting) < 0.6 * sizes(widened)
    assert resting.dtype == torch.float32
    for ours, theirs in zip(Engine(resting).render(REQUESTS), Engine(widened).render(REQUESTS), strict=True):
        assert np.array_equal(ours, theirs)


def sizes(model: Model) -> int:
    return sum(parameter.nbytes for module in model.modules.values() for parameter in module.parameters())


@HALVES
@pytest.mark.usefixtures("all_large")
def test_no_activation_is_of_half_precision(tiny_folder: Path, dtype: torch.dtype) -> None:
    model, seen = load_model(tiny_folder, dtype=dtype), set[torch.dtype]()

    def note(_: nn.Module, args: Any, made: Any) -> None:
        seen.update(x.dtype for x in (*args, made) if isinstance(x, torch.Tensor) and x.is_floating_point())

    for module in model.modules.values():
        for layer in module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm):
                layer.register_forward_hook(note)
    Engine(model).render(REQUESTS)
    assert seen == {torch.float32}


def test_small_weights_are_widened_at_once_and_large_ones_stay_as_in_their_file() -> None:
    small, large = Linear(16, 16).half(), Linear(1024, 512).half()
    lay_out_weights(nn.Sequential(small, large), torch.float32)
    assert (small.weight.dtype, large.weight.dtype) == (torch.float32, torch.float16)
    assert large.bias.dtype == torch.float32


@torch.inference_mode()
@HALVES
def test_filters_and_prepacked_weights_are_of_the_weights_as_they_rest(dtype: torch.dtype) -> None:
    resting, widened = Conv3x3(512, 512), Conv3x3(512, 512)
    resting.weight.data = resting.weight.data.to(dtype)
    widened.load_state_dict(resting.state_dict())
    x = torch.randn(1, 512, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resting(x), widened(x))
    with a_cpu_that_does_not_prepack():
        assert torch.equal(resting(x), widened(x))
