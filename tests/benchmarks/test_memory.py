"""The accounting counts rightly, and what is published of it holds."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.accounting import META, FusedAttention, LiveBytes
from benchmarks.memory import measure
from benchmarks.memory_rows import counted
from sd_engine import load_model, shipped_model
from sd_engine.model import SD1, Configs

KILOBYTE = 1024
GIGABYTE = 1024**3


def test_storages_are_counted_once_from_their_birth_to_their_end() -> None:
    with LiveBytes() as meter, meter.phase("all"):
        x = torch.zeros(KILOBYTE, device=META, dtype=torch.int8)
        view = x.view(2, -1)[0]
        y = view + 1  # half as large
        assert meter.live == 1.5 * KILOBYTE
        del x
        assert meter.live == 1.5 * KILOBYTE, "a view holds its storage"
        del view
        assert meter.live == 0.5 * KILOBYTE
        del y
    assert (meter.live, meter.peak) == (0, 1.5 * KILOBYTE)


def test_what_an_operation_holds_on_its_way_is_seen_in_inference_mode_too() -> None:
    q = torch.zeros(1, 1, 64, 8, device=META)
    scores = 64 * 64 * q.element_size()
    with torch.inference_mode(), LiveBytes() as plain, plain.phase("attention"):
        nn.functional.scaled_dot_product_attention(q, q, q)
    with torch.inference_mode(), LiveBytes() as fused, FusedAttention(), fused.phase("attention"):
        nn.functional.scaled_dot_product_attention(q, q, q)
    assert plain.peak >= 2 * scores
    assert fused.peak == q.nbytes


def test_each_mode_takes_less_of_the_device_than_the_one_before() -> None:
    shipped = load_model(shipped_model())
    configs = Configs(shipped.text_encoder.config, shipped.unet.config, shipped.vae.config, shipped.schedule)
    measured = {
        offload: measure(configs, torch.float16, offload, side=64) for offload in ("resident", "idle", "sequential")
    }
    for phase in ("at rest", "texts", "U-Net step", "decode", "peak"):
        assert measured["resident"][phase] > measured["idle"][phase] > measured["sequential"][phase]
    assert measured["sequential"]["at rest"] == 0


def test_sd15_at_512_fits_four_gigabytes_in_idle_with_fp16_and_more_room_than_a_context_takes() -> None:
    peak = measure(SD1, torch.float16, "idle", side=512)["peak"]
    # A CUDA context, and what the kernels take for themselves, are not counted: 1 GB is left for them.
    assert peak < 3 * GIGABYTE
    assert peak > 1.7 * GIGABYTE, "the U-Net's weights alone are that much: something was not counted"


def test_a_row_takes_no_more_than_the_reference_s_and_a_larger_one_takes_more() -> None:
    small, large = (counted("ours", "U-Net row", side) for side in (64, 128))
    assert 3 * small < large, "four times the cells"
    assert large <= 1.05 * counted("reference", "U-Net row", 128)
