"""What is published of the memory that tiles save holds."""

from __future__ import annotations

import torch

from benchmarks.vae_memory import peak
from sd_engine.config import VaeConfig

GIGABYTE = 1024**3


def test_a_picture_of_2048_decodes_in_a_tenth_of_the_memory_in_tiles() -> None:
    at_once, in_tiles = (peak(VaeConfig(), torch.float16, "decode", way, 2048) for way in ("at once", "in tiles"))
    assert at_once > 7 * GIGABYTE
    assert in_tiles < 0.1 * at_once


def test_of_the_maps_of_a_picture_at_most_two_of_one_size_wait_at_home() -> None:
    config = VaeConfig(channels=(32, 32), blocks_per_level=2)
    home = peak(config, torch.float16, "decode", "in tiles", 1024, torch.device("cpu"))
    one = 1024 * 1024 * 32 * 2
    # And the picture itself, three channels for their thirty-two, with what is left of the latent's resolution.
    assert 2 * one <= home < 2.5 * one
