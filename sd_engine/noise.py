"""The random numbers of an image: all of them from its own seed, computed on the CPU whatever the device."""

from __future__ import annotations

import math
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sd_engine.request import Noise

_Words = npt.NDArray[np.uint32]

# Philox4x32-10: multipliers, and what the key grows by each round (Salmon et al. 2011, "Parallel random numbers: as
# easy as 1, 2, 3", section 3.4 and its Random123 constants).
_ROUNDS: Final = 10
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_WORD: Final = 0xFFFFFFFF


class NoiseSource(Protocol):
    """One image's draws, in the order in which they are asked for."""

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """The next standard normal numbers: float32, on the CPU."""

    def state(self) -> Tensor:
        """Where the draws stand: uint8 [n], of one n for each kind of source."""

    def set_state(self, state: Tensor) -> None:
        """Go on from there. Raises RuntimeError or TypeError for what is no state of such a source."""


class TorchNoise:
    """torch's CPU generator: what the reference's pipelines draw with a CPU generator of the same seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """As `NoiseSource`."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float32)

    def state(self) -> Tensor:
        """As `NoiseSource`."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """As `NoiseSource`."""
        self.generator.set_state(state)


class CudaNoise:
    """What `torch.randn` draws on a CUDA device with a generator of the same seed, and AUTOMATIC1111 by default.

    There every element has a thread of its own, whose Philox4x32-10 counter is (draws so far, 0, element, 0) and whose
    key is the seed; the first two of its four words become one normal number by Box and Muller's transform.
    This holds while the device has a thread for each element at once, multiprocessors x threads of each: 4 x 64 x 64,
    a latent of 512 x 512 pixels, on any device in use; 4 x 128 x 128 from 64 multiprocessors of 1024 threads on.
    Beyond that CUDA's numbers depend on the device; these stay as they are, as AUTOMATIC1111's "CPU imitating a GPU".
    The words are exact. The transform is in float64 here, in float32 with functions of its own there, so the last bits
    differ: by up to 3e-7 in the eight numbers of a device that it was held to. It was not run beside one.
    """

    def __init__(self, seed: int) -> None:
        self.key = (seed & _WORD, seed >> 32 & _WORD)
        self.drawn = 0

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """As `NoiseSource`."""
        first, second = _philox(self.drawn, math.prod(shape), self.key)
        self.drawn += 1
        return torch.from_numpy(_normal(first, second)).reshape(shape)

    def state(self) -> Tensor:
        """As `NoiseSource`."""
        return torch.tensor(list(self.drawn.to_bytes(8, "little")), dtype=torch.uint8)

    def set_state(self, state: Tensor) -> None:
        """As `NoiseSource`."""
        if state.dtype != torch.uint8 or state.shape != (8,):
            raise TypeError(f"a state of {state.dtype} {list(state.shape)}, not of torch.uint8 [8]")
        self.drawn = int.from_bytes(bytes(state.tolist()), "little")


def noise_source(kind: Noise, seed: int) -> NoiseSource:
    """The source of a new image."""
    return CudaNoise(seed) if kind == "cuda" else TorchNoise(seed)


def _philox(offset: int, count: int, key: tuple[int, int]) -> tuple[_Words, _Words]:
    """The first two words for counters (offset, 0, 0, 0) to (offset, 0, count - 1, 0). uint32 [count] each."""
    zero = np.zeros(count, dtype=np.uint32)
    a, b, c, d = zero + np.uint32(offset & _WORD), zero, np.arange(count, dtype=np.uint32), zero
    for i in range(_ROUNDS):
        key_a, key_b = (np.uint32(word + i * step & _WORD) for word, step in zip(key, _KEY_STEPS, strict=True))
        (high_a, low_a), (high_c, low_c) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
    return a, b


def _product(words: _Words, factor: int) -> tuple[_Words, _Words]:
    """The high and the low word of the 64-bit product."""
    product = words.astype(np.uint64) * np.uint64(factor)
    return (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)


def _normal(first: _Words, second: _Words) -> npt.NDArray[np.float32]:
    """Box and Muller's transform of two uniform words."""
    u, turns = (first + 0.5) * 2.0**-32, (second + 0.5) * 2.0**-32  # the middles of 2^32 parts: u is never 0
    return np.asarray(np.sqrt(-2 * np.log(u)) * np.sin(2 * math.pi * turns), dtype=np.float32)
