"""Attention by plain products is PyTorch's, for whatever scores."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sd_engine import attention
from sd_engine.attention import attend, by_products
from sd_engine.devices import one_thread
from tests.engine.prepacked import a_cpu_that_does_not_prepack, a_cpu_that_prepacks

# Of the largest difference to the mean in float64, in deviations of the values. float32: scores of some ten are exact
# to 1e-6. bfloat16: scores, weights, sums and result have 8 bits, and a score of eight is so far off by 1/32.
BARS = {torch.float32: 1e-4, torch.bfloat16: 0.1}
DTYPES = pytest.mark.parametrize("dtype", BARS, ids=str)  # PyTorch's own products do for bfloat16, on any CPU
LENGTHS = st.integers(1, 40)


@pytest.fixture(autouse=True)
def prepacks() -> Iterator[None]:
    with a_cpu_that_prepacks(), torch.inference_mode():
        yield


def heads(batch: int, heads: int, length: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    x_BND = torch.randn((batch, length, heads * width), generator=torch.Generator().manual_seed(seed))
    x_BGND: Tensor = x_BND.to(dtype).unflatten(-1, (heads, width)).transpose(1, 2)
    return x_BGND


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs).abs().max()) < BARS[ours.dtype]


@DTYPES
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    lengths=st.tuples(LENGTHS, LENGTHS),
    width=st.integers(1, 40),
    block=st.integers(1, 2000),
)
def test_any_shape_in_any_blocks_gives_the_weighted_mean(
    dtype: torch.dtype, batch: int, groups: int, lengths: tuple[int, int], width: int, block: int
) -> None:
    q, k, v = (heads(batch, groups, lengths[i > 0], width, dtype, seed=i) for i in range(3))
    with mock.patch.object(attention, "_SCORES_A_THREAD", block):
        mixed = by_products(q, k, v)
    assert_equal(mixed, exact(q, k, v))
    assert mixed.transpose(1, 2).is_contiguous()  # tokens, so that the next layer copies nothing


@DTYPES
@pytest.mark.parametrize("factor", [200.0, -200.0, 1e4], ids=str)
def test_scores_beyond_the_range_of_a_float_s_exponent_are_weighed_right(dtype: torch.dtype, factor: float) -> None:
    q, k, v = (heads(2, 3, 20, 16, dtype, seed=i) for i in range(3))
    k[1, 2] = q[1, 2] * factor  # all others of the pack are as usual
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as plain:
        mixed = by_products(q, k, v)
    assert plain.call_count == 1
    assert bool(mixed.isfinite().all())
    assert torch.equal(mixed[1:2, 2:3], F.scaled_dot_product_attention(q[1:2, 2:3], k[1:2, 2:3], v[1:2, 2:3]))
    k[1, 2] = q[1, 2]
    usual = by_products(q, k, v)
    usual[1, 2] = mixed[1, 2]
    assert torch.equal(mixed, usual)


@DTYPES
@pytest.mark.parametrize("deviation", [3.0, 6.0, 12.0])
def test_large_scores_are_weighed_as_exactly_as_their_digits_allow(dtype: torch.dtype, deviation: float) -> None:
    q, k, v = (heads(2, 3, 200, 16, dtype, seed=i) for i in range(3))
    q = (q.float() * deviation).to(dtype)
    # The largest of 200 scores is three deviations; in bfloat16 it is rounded by a 512th of itself.
    bar = BARS[dtype] * deviation
    assert float((by_products(q, k, v).double() - exact(q, k, v)).abs().max()) < bar


@torch.inference_mode()
@pytest.mark.parametrize("side", [17, 24])
def test_with_one_thread_no_bit_of_a_row_depends_on_its_neighbours(side: int) -> None:
    q, k, v = (heads(3, 8, side**2, 16, torch.bfloat16, seed=i) for i in range(3))
    with one_thread():
        together = by_products(q, k, v)
        for b in range(3):
            assert torch.equal(together[b : b + 1], by_products(q[b : b + 1], k[b : b + 1], v[b : b + 1]))


@DTYPES
def test_what_is_not_a_number_stays_in_its_row(dtype: torch.dtype) -> None:
    q, k, v = (heads(2, 3, 20, 16, dtype, seed=i) for i in range(3))
    alone = by_products(q[1:], k[1:], v[1:])
    q[0, :, 3] = torch.nan
    mixed = by_products(q, k, v)
    assert not mixed[0].isfinite().all()
    assert torch.allclose(mixed[1:].float(), alone.float(), atol=BARS[dtype])


@DTYPES
def test_only_where_it_pays(dtype: torch.dtype) -> None:
    few, some, many = (heads(1, 1, length, 8, dtype, seed=0) for length in (64, 128, 512))
    with mock.patch.object(attention, "by_products", wraps=by_products) as products:
        with mock.patch("torch.cpu._is_amx_tile_supported", return_value=False):
            attend(few, few, few)
            assert not products.called
            attend(some, some, some)
            assert products.called is (dtype == torch.bfloat16)
            attend(many, many, many)
            assert products.called
        products.reset_mock()
        with a_cpu_that_does_not_prepack():
            attend(many, many, many)
        with mock.patch("torch.cpu._is_amx_tile_supported", return_value=True):
            attend(many, many, many)
        with torch.inference_mode(False):
            attend(many.clone(), many.clone(), many.clone())
        assert not products.called
