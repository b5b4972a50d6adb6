"""The random numbers of an image: all of them from its own seed, computed on the CPU whatever the device."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sd_engine.request import Noise


class NoiseSource(Protocol):
    """One image's draws, in the order in which they are asked for."""

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """The next standard normal numbers: float32, on the CPU."""


class TorchNoise:
    """torch's CPU generator: what the reference's pipelines draw with a CPU generator of the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """As `NoiseSource`."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)


def noise_source(kind: Noise, seed: int) -> NoiseSource:
    """The source of a new image."""
    return TorchNoise(seed)
