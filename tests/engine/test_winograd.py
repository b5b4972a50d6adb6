"""The convolutions with fewer multiplications are the plain ones, rounded otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sd_engine import load_model, winograd
from sd_engine.layers import Conv2d, Conv3x3, Linear, lay_out_weights, spare_memory
from sd_engine.winograd import F2, F4, Filters, Form, convolve, form_for
from tests.engine.prepacked import a_cpu_that_does_not_prepack

# Of the largest difference to the sum in float64, in deviations of the result. 7 digits; F4's maps have entries up to
# 8, and differences of products that are so much larger than the result lose one digit and a half.
BARS = {F2: 1e-5, F4: 2e-4}
FORMS = pytest.mark.parametrize("form", [F2, F4], ids=["F2", "F4"])
SIDES = st.integers(1, 19)


@pytest.fixture(autouse=True)
def a_cpu_that_chooses_winograd() -> Iterator[None]:
    with a_cpu_that_does_not_prepack():
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(x_UCHW: Tensor, weight_OC33: Tensor, bias_O: Tensor | None) -> Tensor:
    return F.conv2d(x_UCHW.double(), weight_OC33.double(), None if bias_O is None else bias_O.double(), padding=1)


def assert_equal(ours: Tensor, theirs: Tensor, form: Form) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.square().mean().sqrt()) < BARS[form]


@FORMS
@given(
    count=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    sides=st.tuples(SIDES, SIDES),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_any_shape_and_layout_gives_the_plain_convolution(
    form: Form, count: int, channels: tuple[int, int], sides: tuple[int, int], bias: bool, last: bool
) -> None:
    x, weight = noise(count, channels[0], *sides), noise(channels[1], channels[0], 3, 3, seed=1)
    bias_O = noise(channels[1], seed=2) if bias else None
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    assert_equal(convolve(x, Filters.of(weight, form), bias_O), exact(x, weight, bias_O), form)


@FORMS
def test_each_picture_may_have_a_bias_of_its_own(form: Form) -> None:
    x, weight, bias_UO = noise(3, 8, 9, 10), noise(5, 8, 3, 3, seed=1), noise(3, 5, seed=2)
    wanted = exact(x, weight, None) + bias_UO.double()[:, :, None, None]
    assert_equal(convolve(x, Filters.of(weight, form), bias_UO), wanted, form)


@FORMS
def test_work_in_strips_gives_the_same_as_work_at_once(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = noise(3, 8, 21, 18), noise(5, 8, 3, 3, seed=1), noise(5, seed=2)
    monkeypatch.setattr(winograd, "_WORK", 1)
    assert_equal(convolve(x, Filters.of(weight, form), bias), exact(x, weight, bias), form)


@torch.inference_mode()
def test_a_pictures_numbers_that_are_not_finite_stay_its_own() -> None:
    x, filters = noise(2, 8, 12, 12), Filters.of(noise(8, 8, 3, 3, seed=1), F4)
    alone = convolve(x[1:], filters, None)
    x[0, 3, 4, 5] = torch.nan
    both = convolve(x, filters, None)
    assert not both[0].isfinite().all()
    assert torch.allclose(both[1:], alone, rtol=0, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("channels", "side", "form"), [(128, 12, F4), (128, 8, F2), (512, 2, F2)])
def test_a_wide_layer_takes_the_form_for_its_size(channels: int, side: int, form: Form) -> None:
    conv, x = Conv3x3(channels, channels), noise(1, channels, side, side)
    assert form_for(conv.weight, x) is form
    assert_equal(conv(x), exact(x, conv.weight, conv.bias), form)


@torch.inference_mode()
def test_narrow_layers_small_maps_and_half_precision_are_convolved_plainly() -> None:
    wide = noise(128, 128, 3, 3)
    assert form_for(noise(96, 128, 3, 3), noise(1, 128, 32, 32)) is None
    assert form_for(wide, noise(1, 128, 5, 7)) is None
    assert form_for(wide.bfloat16(), noise(1, 128, 32, 32).bfloat16()) is None


def test_plain_convolutions_have_their_weights_in_the_layout_of_their_maps(tiny_folder: Path) -> None:
    model = load_model(tiny_folder)
    convs = [layer for layer in model.unet.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert convs
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)


def test_large_weights_stay_in_the_pages_of_their_file() -> None:
    large = Conv3x3(1024, 512).bfloat16()
    before = large.weight.data_ptr()
    lay_out_weights(nn.Sequential(large), torch.float32)
    assert large.weight.data_ptr() == before


def test_training_is_left_alone() -> None:
    conv, x = Conv3x3(128, 128), noise(1, 128, 8, 8)
    assert form_for(conv.weight, x) is None
    conv(x).sum().backward()
    assert conv.weight.grad is not None


@torch.no_grad()
def test_weights_that_were_changed_are_noticed() -> None:
    conv, x = Conv3x3(128, 128), noise(1, 128, 8, 8)
    conv(x)
    conv.weight.mul_(2)
    assert_equal(conv(x), exact(x, conv.weight, conv.bias), F2)
    conv.load_state_dict({"weight": noise(128, 128, 3, 3), "bias": noise(128)}, assign=True)
    assert_equal(conv(x), exact(x, conv.weight, conv.bias), F2)


@torch.inference_mode()
def test_a_model_that_spares_memory_keeps_no_filters() -> None:
    conv, x = Conv3x3(128, 128), noise(1, 128, 8, 8)
    spare_memory(nn.Sequential(conv), True)
    assert_equal(conv(x), exact(x, conv.weight, conv.bias), F2)
    assert not conv.made


def test_the_modes_of_offload_decide_whether_memory_is_spared(tiny_folder: Path) -> None:
    for offload, sparing in (("resident", False), ("idle", True), ("sequential", True)):
        model = load_model(tiny_folder, offload=offload)
        layers = [layer for layer in model.unet.modules() if isinstance(layer, Conv2d | Linear)]
        assert layers
        assert {layer.made.sparing for layer in layers} == {sparing}
