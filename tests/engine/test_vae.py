"""The VAE gives what diffusers' gives with the same weights, both ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from sd_engine.config import VaeConfig
from sd_engine.keymaps import DIFFUSERS_VAE
from sd_engine.vae import Vae
from tests.engine.reference import difference, pour
from tests.tiny_model import randomize

# float32 keeps 7 digits; a dozen convolutions, their sums taken in another order, lose at most two of them.
TOLERANCE = 2e-5

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
