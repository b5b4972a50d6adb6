"""Pictures leave the VAE whole: whatever the size, the memory and the range of numbers of the device."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sd_engine import Model, Request, load_model
from sd_engine.halving import halving
from sd_engine.latents import DECODE_BATCH, DECODE_CELLS, decode_batches, decode_latents, encode_picture
from sd_engine.row import Lane, Row
from sd_engine.samplers import step_table
from sd_engine.schedules import NoiseSchedule
from tests.engine.half import cpu_with_units
from tests.engine.reference import difference

# Tiles add in another order than whole pictures: see test_vae_tiles.
TILED = 2e-5

_TABLE = step_table("ddim", NoiseSchedule(), 1, None)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


@pytest.fixture
def half_model(tiny_folder: Path) -> Model:
    """In float16, whose end is 65504; numbers of one give at most `reach` in the first layers of the two ways."""
    with cpu_with_units():
        model = load_model(tiny_folder, dtype="fp16")
    for conv, reach in ((model.vae.decoder.conv_in, 2e3), (model.vae.encoder.conv_in, 2e5)):
        conv.weight.mul_(reach / conv.weight.float().abs().sum(dim=(1, 2, 3)).max())
    return model


@pytest.fixture
def no_room_at_once(model: Model) -> list[int]:
    """The model's VAE runs out of memory whenever it is asked for whole pictures; how many they were."""
    asked: list[int] = []

    def refuse(module: nn.Module, args: tuple[Tensor]) -> None:
        asked.append(len(args[0]))
        raise torch.OutOfMemoryError("CUDA out of memory")

    for half in (model.vae.encoder, model.vae.decoder):
        half.register_forward_pre_hook(refuse)
    return asked


def never_at_once(model: Model) -> None:
    """From here on, asking for a whole picture is a failure of the test."""

    def refuse(module: nn.Module, args: object) -> None:
        raise AssertionError("a whole picture went through the VAE")

    for half in (model.vae.encoder, model.vae.decoder):
        half.register_forward_pre_hook(refuse)


def test_pictures_above_the_limit_go_in_tiles_and_are_the_same(model: Model) -> None:
    z_BCHW, x_CHW, sample_CHW = noise(2, 4, 6, 9), noise(3, 48, 72), noise(4, 6, 9)
    whole, latent = decode_latents(model, z_BCHW), encode_picture(model, x_CHW, sample_CHW)
    never_at_once(model)
    limit = 48 * 72 - 1
    assert difference(decode_latents(model, z_BCHW, whole_pixels=limit), whole) < TILED
    assert difference(encode_picture(model, x_CHW, sample_CHW, whole_pixels=limit), latent) < TILED
    with pytest.raises(AssertionError, match="a whole picture"):
        decode_latents(model, z_BCHW, whole_pixels=limit + 1)


def test_a_single_picture_that_memory_does_not_suffice_for_goes_in_tiles(
    model: Model, tiny_folder: Path, no_room_at_once: list[int]
) -> None:
    other = load_model(tiny_folder)
    z_BCHW, x_CHW, sample_CHW = noise(1, 4, 4, 4), noise(3, 32, 32), noise(4, 4, 4)
    assert difference(decode_latents(model, z_BCHW), decode_latents(other, z_BCHW)) < TILED
    latent = encode_picture(other, x_CHW, sample_CHW)
    assert difference(encode_picture(model, x_CHW, sample_CHW), latent) < TILED
    assert no_room_at_once == [1, 1]


def test_several_pictures_that_do_not_fit_are_parted_first(model: Model, no_room_at_once: list[int]) -> None:
    rows = [a_row(Lane("tiny", 32, 32)) for _ in range(3)]
    drawn: dict[int, Tensor] = {}

    def decode(part: Sequence[Row]) -> None:
        drawn.update(zip((row.id for row in part), decode_latents(model, noise(len(part), 4, 4, 4)), strict=True))

    halving(decode, rows)
    assert list(drawn) == [row.id for row in rows]
    assert no_room_at_once == [3, 1, 2, 1, 1]


def test_an_error_that_is_not_of_memory_is_not_answered_with_tiles(model: Model) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        decode_latents(model, noise(1, 3, 4, 4))


def test_a_picture_beyond_float16_is_decoded_in_float32_and_its_neighbours_are_not(half_model: Model) -> None:
    vae = half_model.vae
    z_BCHW = noise(3, 4, 4, 4)
    z_BCHW[1] *= 100
    before = {name: (tensor, tensor.clone()) for name, tensor in vae.state_dict(keep_vars=True).items()}
    with torch.inference_mode():
        plain = vae.decode(z_BCHW.half())
        assert [bool(picture.isfinite().all()) for picture in plain] == [True, False, True]
        pictures = decode_latents(half_model, z_BCHW)
    assert bool(pictures.isfinite().all())
    # The very same call, the very same bits.
    assert torch.equal(pictures[[0, 2]], plain[[0, 2]].float())
    for name, tensor in vae.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert torch.equal(tensor, before[name][1])
    # float32 from the same weights: nothing but the latent itself (given in float32) differs, and it does not.
    with torch.inference_mode():  # else gradients would be kept, which other kernels compute
        assert torch.equal(pictures[1:2], vae.float().decode(z_BCHW[1:2]))


def test_a_picture_beyond_float16_is_encoded_in_float32(half_model: Model) -> None:
    dim_CHW, sample_CHW = noise(3, 32, 32).clamp(-1, 1) / 100, noise(4, 4, 4)
    for picture_CHW, in_range in ((dim_CHW, True), (dim_CHW * 100, False)):
        mean, _ = half_model.vae.moments(picture_CHW.half()[None])
        assert bool(mean.isfinite().all()) is in_range
    latent = encode_picture(half_model, dim_CHW * 100, sample_CHW)
    assert torch.equal(latent, half_model.vae.float().encode(dim_CHW[None] * 100, sample_CHW[None])[0])


def test_a_picture_beyond_float16_that_is_large_too_is_decoded_in_float32_in_tiles(half_model: Model) -> None:
    z_BCHW = noise(1, 4, 5, 7) * 100
    never_at_once(half_model)
    picture = decode_latents(half_model, z_BCHW, whole_pixels=0)
    vae = deepcopy(half_model.vae).float()
    assert difference(picture, vae.decode(z_BCHW, vae.decoder.forward)) < TILED


def test_a_latent_that_is_not_finite_stays_so_alone(half_model: Model) -> None:
    z_BCHW = noise(2, 4, 4, 4)
    alone = decode_latents(half_model, z_BCHW)
    z_BCHW[0, 0, 0, 0] = torch.nan
    pictures = decode_latents(half_model, z_BCHW)
    assert not bool(pictures[0].isfinite().all())
    assert torch.equal(pictures[1], alone[1])


LANES = (Lane("a", 64, 64), Lane("a", 512, 512), Lane("b", 512, 512), Lane("a", 768, 512), Lane("a", 2048, 2048))
_ids = count()


def a_row(lane: Lane) -> Row:
    return Row(next(_ids), Request("x"), lane, _TABLE)


@given(lanes=st.lists(st.sampled_from(LANES), max_size=40), limit=st.integers(1, 20) | st.none())
def test_decode_batches_hold_every_row_once_and_both_limits(lanes: list[Lane], limit: int | None) -> None:
    rows = [a_row(lane) for lane in lanes]
    batches = decode_batches(rows) if limit is None else decode_batches(rows, limit)
    for lane in LANES:
        kept = [row for batch in batches for row in batch if row.lane == lane]
        assert kept == [row for row in rows if row.lane == lane], "in order, each once"
    for batch in batches:
        assert len({row.lane for row in batch}) == 1
        assert len(batch) <= (limit or DECODE_BATCH)
        assert len(batch) == 1 or len(batch) * batch[0].lane.cells <= DECODE_CELLS


def test_decode_batches_are_as_full_as_the_limits_allow() -> None:
    assert [len(batch) for batch in decode_batches(a_row(LANES[1]) for _ in range(9))] == [4, 4, 1]
    assert [len(batch) for batch in decode_batches((a_row(LANES[1]) for _ in range(3)), 1)] == [1, 1, 1]
    assert [len(batch) for batch in decode_batches(a_row(LANES[4]) for _ in range(2))] == [1, 1]


def test_a_decode_batch_without_room_for_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=0 is not allowed"):
        decode_batches([], 0)
