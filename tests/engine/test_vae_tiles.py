"""A picture that went through the VAE in tiles is the one that went through at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_engine import load_model, shipped_model
from sd_engine.config import VaeConfig
from sd_engine.vae import Vae
from sd_engine.vae_tiles import decode_in_tiles, encode_in_tiles
from tests.engine.reference import difference
from tests.tiny_model import randomize

# Of the largest difference in deviations of the whole output. Sums of a norm are taken in another order, and kernels
# for other sizes add in another order: float32 keeps 7 digits, a dozen layers lose at most two of them. 3e-6 is seen.
TOLERANCE = 2e-5

# Changes of resolution by 8 and by 2, and levels with and without a change of channels.
CONFIGS = (
    VaeConfig(channels=(8, 8, 16, 16), blocks_per_level=1, norm_groups=4),
    VaeConfig(channels=(8, 16), blocks_per_level=2, norm_groups=4),
)


def make_vae(config: VaeConfig) -> Vae:
    vae = Vae(config).eval().requires_grad_(False)
    randomize(vae, 1)
    return vae


VAES = tuple(make_vae(config) for config in CONFIGS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(vae: Vae, z_BCHW: Tensor, tile: int) -> Tensor:
    return vae.decode(z_BCHW, partial(decode_in_tiles, vae.decoder, tile=tile))


def encoded(vae: Vae, x_BCHW: Tensor, tile: int) -> Tensor:
    return vae.moments(x_BCHW, partial(encode_in_tiles, vae.encoder, tile=tile))[0]


# Down to one cell, narrow as a ribbon, tiles that do not divide the picture, and larger ones.
_SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6)) | st.sampled_from([(1, 24), (24, 1), (2, 17)])
_TILES = st.integers(5, 24) | st.sampled_from([256])


@settings(max_examples=15, deadline=None)
@given(vae=st.sampled_from(VAES), sides=_SIDES, tile=_TILES, pictures=st.integers(1, 2))
def test_decoding_in_tiles_of_any_size_is_decoding_at_once(
    vae: Vae, sides: tuple[int, int], tile: int, pictures: int
) -> None:
    z_BCHW = noise(pictures, 4, *sides)
    assert difference(decoded(vae, z_BCHW, tile), vae.decode(z_BCHW)) < TOLERANCE


@settings(max_examples=15, deadline=None)
@given(vae=st.sampled_from(VAES), sides=_SIDES, tile=_TILES, pictures=st.integers(1, 2), odd=st.booleans())
def test_encoding_in_tiles_of_any_size_is_encoding_at_once(
    vae: Vae, sides: tuple[int, int], tile: int, pictures: int, odd: bool
) -> None:
    # An odd side loses its last row and column on the way down, wherever a tile ends.
    height, width = (side * vae.config.factor + (vae.config.factor - 1 if odd else 0) for side in sides)
    x_BCHW = noise(pictures, 3, height, width)
    assert difference(encoded(vae, x_BCHW, tile), vae.moments(x_BCHW)[0]) < TOLERANCE


def test_tiles_of_one_cell_give_the_picture_too() -> None:
    vae = VAES[1]
    z_BCHW, x_BCHW = noise(1, 4, 3, 4), noise(1, 3, 6, 8)
    assert difference(decoded(vae, z_BCHW, 1), vae.decode(z_BCHW)) < TOLERANCE
    assert difference(encoded(vae, x_BCHW, 1), vae.moments(x_BCHW)[0]) < TOLERANCE


def test_a_picture_whose_halves_differ_in_brightness_and_contrast_has_no_seam() -> None:
    # The worst case of tiles that are normalised one by one: each would stretch its own half.
    vae = VAES[0]
    z_BCHW = noise(1, 4, 12, 12) * torch.where(torch.arange(12) < 6, 0.01, 5.0) + torch.arange(12).float()
    at_once = vae.decode(z_BCHW)
    assert difference(decoded(vae, z_BCHW, 48), at_once) < TOLERANCE
    alone = torch.cat([vae.decode(half) for half in z_BCHW.split(6, dim=3)], dim=3)
    assert difference(alone, at_once) > 0.1, "the picture is too tame to show a seam"


@torch.no_grad()
def test_statistics_are_no_less_exact_than_at_once_where_means_are_far_from_zero() -> None:
    vae = make_vae(CONFIGS[0])
    assert vae.decoder.conv_in.bias is not None
    vae.decoder.conv_in.bias.add_(torch.linspace(-300.0, 300.0, 16))
    z_BCHW = noise(1, 4, 8, 8)
    at_once, in_tiles = vae.decode(z_BCHW), decoded(vae, z_BCHW, 20)
    exact = vae.double().decode(z_BCHW.double()).float()
    # Twice: both are off by rounding, and in other directions.
    assert difference(in_tiles, exact) < 2 * difference(at_once, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_tiles_change_less_than_the_precision_does(dtype: torch.dtype) -> None:
    vae, z_BCHW, x_BCHW = make_vae(CONFIGS[0]), noise(1, 4, 8, 8), noise(1, 3, 64, 64)
    exact_z, exact_x = vae.decode(z_BCHW), vae.moments(x_BCHW)[0]
    vae.to(dtype)
    for at_once, in_tiles, exact in (
        (vae.decode(z_BCHW.to(dtype)), decoded(vae, z_BCHW.to(dtype), 20), exact_z),
        (vae.moments(x_BCHW.to(dtype))[0], encoded(vae, x_BCHW.to(dtype), 20), exact_x),
    ):
        assert in_tiles.dtype == dtype
        # A bit that a sum rounds otherwise may grow, layer by layer, to what every rounding of this precision is.
        assert difference(in_tiles.float(), at_once.float()) < 2 * difference(at_once.float(), exact)


def test_what_is_given_is_not_written_to() -> None:
    vae = VAES[0]
    z_BCHW, x_BCHW = noise(1, 4, 4, 4), noise(1, 3, 32, 32)
    kept = z_BCHW.clone(), x_BCHW.clone()
    decode_in_tiles(vae.decoder, z_BCHW, 8)
    encode_in_tiles(vae.encoder, x_BCHW, 8)
    assert torch.equal(z_BCHW, kept[0])
    assert torch.equal(x_BCHW, kept[1])


@torch.inference_mode()
def test_the_shipped_model_draws_a_large_picture_the_same_in_tiles() -> None:
    vae = load_model(shipped_model()).vae
    z_BCHW = noise(1, 4, 20, 28)
    # 1.1e-5 of [-1, 1] is seen, a thousandth of one of 256 levels: a tile may be convolved by another form of the same
    # sum than the whole picture.
    assert float((decoded(vae, z_BCHW, 96) - vae.decode(z_BCHW)).abs().max()) < 5e-5


@pytest.mark.slow
@torch.inference_mode()
def test_a_vae_of_sds_full_size_decodes_and_encodes_the_same_in_tiles() -> None:
    vae = make_vae(VaeConfig())
    z_BCHW, x_BCHW = noise(1, 4, 40, 48), noise(1, 3, 320, 384)
    # Its layers are wide enough for Winograd's algorithm, whose larger form rounds ten times as coarsely, and otherwise
    # in a tile that begins elsewhere: 9e-5 is seen.
    assert difference(decoded(vae, z_BCHW, 128), vae.decode(z_BCHW)) < 10 * TOLERANCE
    assert difference(encoded(vae, x_BCHW, 128), vae.moments(x_BCHW)[0]) < 10 * TOLERANCE
