"""Whose random numbers an image has: torch's, or those of a CUDA device, and always its own."""

from __future__ import annotations

import numpy as np
import torch

from sd_engine.noise import CudaNoise, TorchNoise, _philox, noise_source

# What torch.randn(8, device="cuda") gives after torch.manual_seed(0).
CUDA_SEED_0 = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564, -0.62285122, -0.32838709]


def test_philox_gives_the_published_words() -> None:
    """The known answer of Random123 for philox4x32-10, counter and key all zero."""
    first, second = _philox(0, 1, (0, 0))
    assert (first[0], second[0]) == (0x6627E8D5, 0xE169C58D)


def test_cuda_noise_is_what_a_cuda_device_draws() -> None:
    drawn = noise_source("cuda", 0).draw((2, 4))
    assert drawn.dtype == torch.float32 and drawn.shape == (2, 4)
    # A device takes logarithm, root and sine in float32 with functions of its own: 2e-7 of 2.6 was seen.
    np.testing.assert_allclose(drawn.flatten(), CUDA_SEED_0, rtol=0, atol=5e-7)


def test_cuda_noise_does_not_depend_on_the_size_that_is_drawn() -> None:
    small, large = CudaNoise(7).draw((5,)), CudaNoise(7).draw((4, 96, 96))
    assert torch.equal(small, large.flatten()[:5])


def test_cuda_noise_goes_on_with_each_draw() -> None:
    source = CudaNoise(3)
    first, second = source.draw((4, 64, 64)), source.draw((4, 64, 64))
    again = CudaNoise(3)
    assert torch.equal(again.draw((4, 64, 64)), first) and torch.equal(again.draw((4, 64, 64)), second)
    both = torch.stack([first, second]).flatten(1).double()
    # 16384 numbers each: five deviations of a mean, of a mean square and of a mean product.
    assert both.mean(1).abs().max() < 5 / 128
    assert (both.square().mean(1) - 1).abs().max() < 5 * 2**0.5 / 128
    assert (both[0] * both[1]).mean().abs() < 5 / 128


def test_every_seed_has_its_own_cuda_noise() -> None:
    # 2**32 and 0 share their low word, 2**64 - 1 fills both. (torch's CPU generator reads the low word only.)
    drawn = [tuple(CudaNoise(seed).draw((4,)).tolist()) for seed in (0, 1, 2**32, 2**32 + 1, 2**64 - 1)]
    assert len(set(drawn)) == 5


def test_cpu_noise_is_what_the_references_pipelines_draw() -> None:
    source = noise_source("cpu", 5)
    assert isinstance(source, TorchNoise)
    generator = torch.Generator("cpu").manual_seed(5)
    for shape in ((4, 8, 8), (2, 3)):
        assert torch.equal(source.draw(shape), torch.randn(shape, generator=generator))
