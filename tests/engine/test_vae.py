"""The VAE gives what diffusers' gives with the same weights, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from sd_engine.config import VaeConfig
from sd_engine.keymaps import DIFFUSERS_VAE
from sd_engine.vae import Vae, VaeAttention
from tests.engine.reference import difference, pour
from tests.tiny_model import randomize

# float32 keeps 7 digits; a dozen convolutions, their sums taken in another order, lose at most two of them
# (2.3e-5 is seen).
TOLERANCE = 5e-5

Pair = tuple[Any, Vae]  # diffusers' modules are no modules to the type checker


@pytest.fixture(scope="module", params=[(1, (16, 32)), (2, (16, 16, 32)), (1, (8, 16, 16, 32))], ids=str)
def pair(request: pytest.FixtureRequest) -> Pair:
    """The reference and ours with the same random weights: blocks per level, channels."""
    blocks, channels = request.param
    torch.manual_seed(0)
    reference: Any = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=blocks,
        norm_num_groups=8,
        scaling_factor=0.5,
    )
    reference.eval()
    randomize(reference, 1)
    with torch.device("meta"):
        ours = Vae(VaeConfig.from_dict(reference.config))
    return reference, pour(reference, ours, DIFFUSERS_VAE)


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.rand((2, 3, height, width), generator=torch.Generator().manual_seed(2)) * 2 - 1


@torch.no_grad()
def test_moments_equal_the_reference(pair: Pair) -> None:
    reference, ours = pair
    theirs = reference.encode(pixels(40, 72)).latent_dist
    mean, deviation = ours.moments(pixels(40, 72))
    assert mean.shape[-2:] == (40 // ours.config.factor, 72 // ours.config.factor)
    assert difference(mean, theirs.mean) < TOLERANCE
    assert difference(deviation, theirs.std) < TOLERANCE


@torch.no_grad()
def test_decoding_equals_the_reference(pair: Pair) -> None:
    reference, ours = pair
    latents = torch.randn((2, 4, 5, 9), generator=torch.Generator().manual_seed(3))
    theirs = reference.decode(latents / reference.config.scaling_factor).sample
    assert difference(ours.decode(latents), theirs) < TOLERANCE


@torch.no_grad()
def test_encoding_draws_the_sample_that_the_given_noise_means(pair: Pair) -> None:
    _, ours = pair
    mean, deviation = ours.moments(pixels(16, 16))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4))
    # The very same operations on the same numbers: no rounding differs.
    assert torch.equal(ours.encode(pixels(16, 16), noise), (mean + deviation * noise) * 0.5)


@torch.no_grad()
def test_an_enormous_log_variance_is_bounded() -> None:
    ours = Vae(VaeConfig(channels=(8, 8), blocks_per_level=1, norm_groups=4))
    assert ours.quant_conv.bias is not None
    ours.quant_conv.bias.fill_(1e9)
    _, deviation = ours.moments(pixels(8, 8))
    assert bool(deviation.isfinite().all())


@torch.no_grad()
def test_a_scaling_factor_of_its_own_scales_latents_both_ways_and_nothing_else() -> None:
    one, other = (
        Vae(VaeConfig(channels=(8, 8), blocks_per_level=1, norm_groups=4, scaling_factor=factor))
        for factor in (1, 0.25)
    )
    other.load_state_dict(one.state_dict())
    latent = one.encode(pixels(8, 8), torch.zeros(2, 4, 4, 4))
    # A power of two: multiplying by it and dividing by it round nothing.
    assert torch.equal(other.encode(pixels(8, 8), torch.zeros(2, 4, 4, 4)), latent * 0.25)
    assert torch.equal(other.decode(latent * 0.25), one.decode(latent))


@torch.no_grad()
def test_positions_that_attend_in_parts_attend_to_all() -> None:
    layer = VaeAttention(8, groups=4)
    x = torch.randn((1, 8, 130, 130), generator=torch.Generator().manual_seed(5))  # 16900 positions: two parts
    whole = x + layer.attention(layer.group_norm(x).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (130, 130))
    assert difference(layer(x), whole) < TOLERANCE


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
@torch.no_grad()
def test_a_norm_sums_in_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    norm = VaeAttention(8, groups=4).group_norm.to(dtype)
    # Squares of 300 are beyond float16; a sum of many in bfloat16 stands still when it is 256 times as large as each.
    x = (300 * torch.randn((1, 8, 64, 64), generator=torch.Generator().manual_seed(6)) + 100).to(dtype)
    normed, exact = norm(x).double(), norm.double()(x.double())
    # Half a unit in the last place: what comes out is rounded once, and nothing on the way to it was.
    assert float(((normed - exact).abs() / exact.abs().clamp(min=0.01)).max()) < 0.6 * torch.finfo(dtype).eps


@HALVES
@torch.no_grad()
def test_attention_sums_in_float32_whatever_the_dtype(dtype: torch.dtype) -> None:
    attention = VaeAttention(8, groups=4).attention
    attention.to_q.weight.zero_()
    attention.to_q.bias.zero_()  # so all 4096 positions weigh the same, and the softmax sums as many ones
    h_BNC = 1 + torch.randn((1, 4096, 8), generator=torch.Generator().manual_seed(7))
    mixed = attention.to(dtype)(h_BNC.to(dtype)).double()
    exact = attention.double()(h_BNC.to(dtype).double())
    # Three roundings (values, mean, output), each of numbers of one or two; a sum that stands still is off by ones.
    assert float((mixed - exact).abs().max()) < 3 * torch.finfo(dtype).eps
