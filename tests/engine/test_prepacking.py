"""Layers that compute over prepacked weights give what the plain ones give, and keep nothing where memory is spared."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sd_engine import prepacking, winograd
from sd_engine.blocks import Downsample, Upsample
from sd_engine.layers import Conv2d, Conv3x3, GatedLinear, Linear, Pointwise, laid_out, spare_memory
from tests.engine.prepacked import a_cpu_that_does_not_prepack, a_cpu_that_prepacks

# Of the largest difference to the sum in float64, in deviations of the result: some hundred roundings of 24 bits, or
# two of 8 bits (sums of weights, and the result), of values of up to eight deviations.
BARS = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
NO_BF16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16 here")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=NO_BF16)], ids=str)
SIDES = st.integers(1, 9)
really_prepacks = prepacking._prepacks.__wrapped__


@pytest.fixture(autouse=True)
def prepacks() -> Iterator[None]:
    with a_cpu_that_prepacks(), torch.inference_mode():
        yield


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(ours: Tensor, exact: Tensor) -> None:
    assert ours.shape == exact.shape
    assert float((ours.double() - exact).abs().max() / exact.square().mean().sqrt()) < BARS[ours.dtype]


@DTYPES
@given(rows=st.integers(1, 5), widths=st.tuples(st.integers(1, 70), st.integers(1, 70)), bias=st.booleans())
def test_products_are_the_plain_ones(dtype: torch.dtype, rows: int, widths: tuple[int, int], bias: bool) -> None:
    layer, x = Linear(*widths, bias=bias).to(dtype), noise(2, rows, widths[0]).to(dtype)
    exact = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert_equal(layer(x), exact)


@DTYPES
@pytest.mark.parametrize("prepacked", [True, False], ids=["prepacked", "plain"])
def test_the_second_product_gates_the_first(dtype: torch.dtype, prepacked: bool) -> None:
    layer, x = GatedLinear(64, 48).to(dtype), noise(2, 5, 64).to(dtype)
    value, gate = F.linear(x.double(), layer.weight.double(), layer.bias.double()).chunk(2, -1)
    with a_cpu_that_prepacks() if prepacked else a_cpu_that_does_not_prepack():
        assert_equal(layer(x), value * F.gelu(gate))
    assert len(layer.made) == prepacked


@DTYPES
@pytest.mark.parametrize(
    "layer",
    [
        Conv2d(4, 8, 3, padding=1),
        Conv2d(5, 7, 3, stride=2),
        Conv2d(3, 3, 1, bias=False),
        Conv3x3(6, 10),
        Pointwise(8, 4),
    ],
    ids=str,
)
def test_convolutions_are_the_plain_ones(dtype: torch.dtype, layer: Conv2d) -> None:
    layer = copy.deepcopy(layer).to(dtype)
    x = laid_out(noise(3, layer.in_channels, 9, 12).to(dtype))
    bias = None if layer.bias is None else layer.bias.double()
    assert_equal(layer(x), F.conv2d(x.double(), layer.weight.double(), bias, layer.stride, layer.padding))


@DTYPES
@given(
    count=st.integers(1, 3), channels=st.tuples(st.integers(1, 20), st.integers(1, 20)), sides=st.tuples(SIDES, SIDES)
)
def test_a_doubled_map_is_convolved_as_the_enlarged_one(
    dtype: torch.dtype, count: int, channels: tuple[int, int], sides: tuple[int, int]
) -> None:
    conv, x = Conv3x3(*channels).to(dtype), laid_out(noise(count, channels[0], *sides).to(dtype))
    assert conv.bias is not None
    enlarged = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    assert_equal(conv.doubled(x), F.conv2d(enlarged, conv.weight.double(), conv.bias.double(), padding=1))


def test_a_map_is_also_enlarged_to_an_odd_side() -> None:
    up, x = Upsample(8), laid_out(noise(1, 8, 3, 4))
    assert up.conv.bias is not None
    enlarged = F.interpolate(x.double(), size=(5, 8), mode="nearest")
    assert_equal(up(x, (5, 8)), F.conv2d(enlarged, up.conv.weight.double(), up.conv.bias.double(), padding=1))


LAYERS = pytest.mark.parametrize(
    ("layer", "x"),
    [
        (Linear(8, 6), noise(2, 5, 8)),
        (Linear(320, 1280), noise(2, 64, 320)),
        (Linear(32, 32), noise(1, 64, 32)),
        (GatedLinear(8, 6), noise(5, 8)),
        (Conv3x3(8, 6), laid_out(noise(2, 8, 5, 6))),
        (Downsample(8, pad_all_sides=True), laid_out(noise(2, 8, 6, 6))),
        (Pointwise(8, 6), laid_out(noise(2, 8, 5, 6))),
        (Upsample(8), laid_out(noise(2, 8, 5, 6))),
    ],
    ids=lambda each: type(each).__name__,
)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    with a_cpu_that_does_not_prepack():
        return layer(x).double()  # type: ignore[no-any-return]


@LAYERS
def test_no_bit_depends_on_whether_memory_is_spared(layer: nn.Module, x: Tensor) -> None:
    spared = copy.deepcopy(layer)
    spare_memory(nn.ModuleList([spared]), True)
    assert torch.equal(layer(x), spared(x))
    assert not any(len(each.made) for each in spared.modules() if isinstance(each, Linear | Conv2d))


@LAYERS
def test_weights_that_were_changed_are_noticed(layer: nn.Module, x: Tensor) -> None:
    layer = copy.deepcopy(layer)
    layer(x)
    state = {name: tensor * 2 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert_equal(layer(x), plain(layer, x))
    with torch.inference_mode(False), torch.no_grad():
        changed = copy.deepcopy(layer)
        changed(x.clone())
        assert any(len(each.made) for each in changed.modules() if isinstance(each, Linear | Conv2d))
        for parameter in changed.parameters():
            parameter.mul_(0.5)
        assert_equal(changed(x.clone()), plain(changed, x.clone()))


@LAYERS
def test_a_copied_or_pickled_layer_makes_its_own(layer: nn.Module, x: Tensor) -> None:
    layer(x)
    pickled: nn.Module = pickle.loads(pickle.dumps(layer))  # noqa: S301 (our own)
    copied = nn.ModuleList([copy.deepcopy(layer), pickled])
    assert not any(len(each.made) for each in copied.modules() if isinstance(each, Linear | Conv2d))


def test_gradients_other_dtypes_and_other_devices_are_left_to_pytorch() -> None:
    here = torch.ones(1)
    assert prepacking.serves(here, torch.float32)
    assert not prepacking.serves(torch.ones(1, device="meta"), torch.float32)
    assert not prepacking.serves(here, torch.float16)
    with torch.inference_mode(False):
        assert not prepacking.serves(here, torch.float32)
        layer = Linear(4, 4)
        layer(torch.ones(4)).sum().backward()
        assert layer.weight.grad is not None


def test_within_torch_compile_layers_are_plain_ones() -> None:
    weight, x = noise(128, 128, 3, 3), noise(1, 128, 12, 12)
    with a_cpu_that_does_not_prepack():
        assert winograd.form_for(weight, x) is not None
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        assert winograd.form_for(weight, x) is None
        assert not prepacking.serves(x, torch.float32)


def test_only_avx_512_prepacks() -> None:
    for capability, prepacked in (("AVX512", True), ("AVX2", False), ("DEFAULT", False)):
        with (
            mock.patch("torch.backends.cpu.get_cpu_capability", return_value=capability),
            mock.patch("sd_engine.prepacking.computes", return_value=True),
        ):
            assert really_prepacks(torch.float32) is really_prepacks(torch.bfloat16) is prepacked
            assert not really_prepacks(torch.float64)
            with mock.patch.object(prepacking, "_OPERATORS", ("of_another_release",)):
                assert not really_prepacks(torch.float32)
    with mock.patch("sd_engine.prepacking.computes", return_value=False):
        assert not really_prepacks(torch.bfloat16)
