"""The U-Net gives what diffusers' gives with the same weights."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sd_engine.config import UNetConfig
from sd_engine.context import join
from sd_engine.keymaps import DIFFUSERS_UNET
from sd_engine.unet import _TOKENS_AT_ONCE, UNet
from tests.engine import reference as sd15
from tests.engine.prepacked import a_cpu_that_does_not_prepack, a_cpu_that_prepacks
from tests.engine.reference import difference, pour
from tests.tiny_model import randomize

# float32 keeps 7 digits; some thirty layers, their sums taken in another order, lose at most two of them.
TOLERANCE = 2e-5
DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}

Pair = tuple[Any, UNet]  # diffusers' modules are no modules to the type checker


def make_pair(
    channels: tuple[int, ...],
    attention: tuple[bool, ...],
    heads: int | tuple[int, ...],
    blocks: int = 1,
    linear_projection: bool = False,
) -> Pair:
    """The reference and ours with the same random weights."""
    torch.manual_seed(0)
    reference: Any = UNet2DConditionModel(
        block_out_channels=channels,
        down_block_types=tuple(DOWN[has] for has in attention),
        up_block_types=tuple(UP[has] for has in reversed(attention)),
        layers_per_block=blocks,
        cross_attention_dim=24,
        attention_head_dim=heads,
        norm_num_groups=8,
        use_linear_projection=linear_projection,
    )
    reference.eval()
    randomize(reference, 1)
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(reference.config))
    return reference, pour(reference, ours, DIFFUSERS_UNET)


def compare(pair: Pair, height: int, width: int) -> float:
    """The largest difference over three rows with a timestep (one of them fractional) and a text each."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn((3, 4, height, width), generator=generator)
    timesteps = torch.tensor([0.0, 500.25, 999.0])
    texts = torch.randn((3, 7, 24), generator=generator)
    return difference(pair[1](latents, timesteps, texts), pair[0](latents, timesteps, texts).sample)


@pytest.mark.parametrize(
    ("channels", "attention", "heads", "blocks"),
    [
        ((32, 64), (True, False), 2, 1),
        ((32, 64), (True, True), (2, 8), 2),
        ((16, 32, 32), (False, True, True), 4, 1),
        ((16, 32, 48, 48), (True, True, True, False), 8, 2),  # SD 1.x, narrower
        ((64, 128, 192), (True, True, True), 4, 1),
    ],
)
@torch.no_grad()
def test_the_prediction_equals_the_reference(
    channels: tuple[int, ...], attention: tuple[bool, ...], heads: int | tuple[int, ...], blocks: int
) -> None:
    assert compare(make_pair(channels, attention, heads, blocks), 8, 16) < TOLERANCE


@pytest.mark.parametrize(("height", "width"), [(9, 13), (5, 8), (11, 7), (1, 3)])
@torch.no_grad()
def test_odd_sizes_come_back_to_their_size_as_in_the_reference(height: int, width: int) -> None:
    assert compare(make_pair((16, 32, 32), (True, True, False), 2), height, width) < TOLERANCE


@torch.no_grad()
def test_so_many_positions_that_they_go_in_parts_equal_the_reference() -> None:
    assert _TOKENS_AT_ONCE < 36 * 33
    pair = make_pair((16, 32), (True, False), 2)
    for cpu in (a_cpu_that_prepacks(), a_cpu_that_does_not_prepack()):
        with cpu:
            assert compare(pair, 36, 33) < TOLERANCE


@torch.no_grad()
def test_linear_projections_equal_the_reference() -> None:
    assert compare(make_pair((32, 64), (True, True), (2, 4), linear_projection=True), 8, 6) < TOLERANCE


@torch.no_grad()
def test_a_row_alone_equals_the_same_row_among_others() -> None:
    _, ours = make_pair((32, 64), (True, False), 2)
    generator = torch.Generator().manual_seed(3)
    latents, texts = torch.randn((4, 4, 8, 8), generator=generator), torch.randn((4, 7, 24), generator=generator)
    timesteps = torch.tensor([1.0, 250.0, 600.0, 950.0])
    together = ours(latents, timesteps, texts)
    alone = torch.cat([ours(latents[i : i + 1], timesteps[i : i + 1], texts[i : i + 1]) for i in range(4)])
    # Matrix kernels choose their blocking by the batch, which is another order of the same sums.
    assert difference(alone, together) < TOLERANCE


@torch.no_grad()
def test_keys_and_values_made_before_give_what_the_texts_give() -> None:
    reference, ours = make_pair((16, 32, 48), (True, False, True), 4, blocks=2)
    generator = torch.Generator().manual_seed(3)
    latents, texts = torch.randn((3, 4, 8, 8), generator=generator), torch.randn((3, 7, 24), generator=generator)
    timesteps = torch.tensor([1.0, 250.0, 600.0])
    theirs = reference(latents, timesteps, texts).sample
    assert difference(ours(latents, timesteps, join([ours.context(text) for text in texts])), theirs) < TOLERANCE


@torch.no_grad()
def test_with_keys_and_values_at_hand_nothing_is_projected_from_a_text() -> None:
    _, ours = make_pair((32, 64), (True, True), 2)
    contexts = [ours.context(torch.ones(7, 24))]
    projections = [layer for block in ours.blocks for layer in (block.attn2.to_k, block.attn2.to_v)]
    called = list[nn.Module]()
    for layer in projections:
        layer.register_forward_hook(lambda module, *_: called.append(module))
    ours(torch.zeros(1, 4, 8, 8), torch.tensor([1.0]), join(contexts))
    assert called == []
    ours.context(torch.ones(7, 24))
    assert len(called) == len(projections) == len(set(called))


@torch.no_grad()
def test_rows_with_texts_of_different_lengths_are_each_the_row_alone() -> None:
    reference, ours = make_pair((32, 64), (True, True), 2)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn((5, 4, 8, 8), generator=generator)
    texts = [torch.randn((length, 24), generator=generator) for length in (7, 7, 14, 21, 7)]  # a run need not be whole
    timesteps = torch.tensor([1.0, 250.0, 600.0, 950.0, 20.0])
    together = ours(latents, timesteps, join([ours.context(text) for text in texts]))
    alone = [reference(latents[i][None], timesteps[i][None], text[None]).sample for i, text in enumerate(texts)]
    assert difference(together, torch.cat(alone)) < TOLERANCE


@torch.no_grad()
def test_the_lengths_of_the_neighbours_texts_change_no_bit_of_a_row() -> None:
    _, ours = make_pair((32, 64), (True, True), 2)
    generator = torch.Generator().manual_seed(3)
    latents, timesteps = torch.randn((3, 4, 8, 8), generator=generator), torch.tensor([1.0, 250.0, 600.0])
    contexts = [ours.context(torch.randn((length, 24), generator=generator)) for length in (7, 7, 14, 21)]
    first, *others = contexts
    beside = [ours(latents, timesteps, join([first, a, b])) for a, b in permutations(others, 2)]
    # A pack of one size meets the same kernels, so there is nothing to tolerate.
    assert all(torch.equal(each[0], beside[0][0]) for each in beside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_at_half_precision_it_is_as_near_to_the_truth_as_the_reference(dtype: torch.dtype) -> None:
    reference, ours = make_pair((16, 32, 48, 48), (True, True, True, False), 8, blocks=2)
    generator = torch.Generator().manual_seed(2)
    latents, texts = torch.randn((3, 4, 8, 8), generator=generator), torch.randn((3, 7, 24), generator=generator)
    timesteps = torch.tensor([0.0, 481.25, 999.0])
    truth = reference(latents, timesteps, texts).sample
    half = latents.to(dtype), timesteps, texts.to(dtype)
    theirs = reference.to(dtype)(*half).sample.float()
    mine = ours.to(dtype)
    # bfloat16 keeps 2 to 3 digits, float16 3 to 4. Where each rounds differs by the kernel, so the two differ from
    # each other about as much as they do from float32; a part that wrongly ran at half precision shows in the truth.
    for texts_ in (half[2], join([mine.context(text) for text in half[2]])):
        predicted = mine(half[0], timesteps, texts_).float()
        assert rms(predicted - truth) < 1.25 * rms(theirs - truth)
        assert difference(predicted, theirs) < (0.1 if dtype == torch.bfloat16 else 0.02)


def rms(x: torch.Tensor) -> float:
    """The root of the mean square."""
    return float(x.square().mean().sqrt())


@pytest.mark.slow
@torch.no_grad()
def test_the_prediction_at_the_full_size_of_sd15_equals_the_reference() -> None:
    """860 million parameters, shared by both; about 4 GB of memory and a minute of CPU."""
    torch.manual_seed(0)
    reference = sd15.sd15_unet().eval()
    with torch.device("meta"):
        ours = UNet(UNetConfig.from_dict(reference.config))
    pour(reference, ours, DIFFUSERS_UNET)
    generator = torch.Generator().manual_seed(2)
    latents, texts = torch.randn((1, 4, 64, 64), generator=generator), torch.randn((1, 77, 768), generator=generator)
    timesteps = torch.tensor([481.0])
    theirs = reference(latents, timesteps, texts).sample
    # Over a hundred layers, sums over up to 23040 numbers: three of the 7 digits may go.
    assert difference(ours(latents, timesteps, texts), theirs) < 2e-4
