"""Norms of small maps in bfloat16 go by float32, where PyTorch's own are slow, and are as exact as those."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from sd_engine import layers
from sd_engine.layers import GroupNorm


def norm(channels: int, dtype: torch.dtype) -> GroupNorm:
    made = GroupNorm(32, channels, eps=1e-6).requires_grad_(False)
    generator = torch.Generator().manual_seed(channels)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.to(dtype)


def maps(channels: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    x_BCHW = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(side)).to(dtype)
    return x_BCHW.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "side"), [(64, 12), (160, 3), (320, 31), (320, 32)])
def test_a_norm_in_bfloat16_is_that_in_float32_rounded(channels: int, side: int) -> None:
    made, x_BCHW = norm(channels, torch.bfloat16), maps(channels, side, torch.bfloat16)
    with torch.inference_mode():
        found_BCHW = made(x_BCHW)
        exact_BCHW = F.group_norm(x_BCHW.float(), 32, made.weight.float(), made.bias.float(), 1e-6)
    assert found_BCHW.dtype == torch.bfloat16 and found_BCHW.is_contiguous(memory_format=torch.channels_last)
    # Half a step of a number of 8 bits, and PyTorch's own rounds its factors to 8 bits first.
    torch.testing.assert_close(found_BCHW.float(), exact_BCHW, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize(
    ("side", "dtype", "widened"),
    [(31, torch.bfloat16, True), (32, torch.bfloat16, False), (8, torch.float32, False), (8, torch.float16, False)],
)
def test_only_small_maps_of_bfloat16_are_widened(side: int, dtype: torch.dtype, widened: bool) -> None:
    with torch.inference_mode():
        assert layers._widening_pays(maps(64, side, dtype)) is widened


def test_training_and_the_compiler_see_pytorchs_own_norm() -> None:
    x_BCHW = maps(64, 8, torch.bfloat16)
    assert not layers._widening_pays(x_BCHW)  # gradients are enabled here
    with torch.inference_mode(), mock.patch("torch.compiler.is_compiling", return_value=True):
        assert not layers._widening_pays(x_BCHW)


def test_a_rows_norm_does_not_depend_on_its_neighbours() -> None:
    made, x_BCHW = norm(64, torch.bfloat16), maps(64, 12, torch.bfloat16)
    with torch.inference_mode():
        together_BCHW, alone_BCHW = made(x_BCHW), torch.cat([made(row_BCHW) for row_BCHW in x_BCHW.split(1)])
    assert torch.equal(together_BCHW, alone_BCHW)
