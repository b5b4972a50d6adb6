"""The tiny decoder is the reference's AutoencoderTiny, and only those who ask for it get its picture."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from sd_engine import Engine, InvalidRequest, Request, WeightsError, load_model, shipped_model
from sd_engine.config import TinyDecoderConfig
from sd_engine.folder_writer import write_tiny_decoder
from sd_engine.latents import decode_batches, decode_tiny
from sd_engine.passes import first_row
from sd_engine.tiny_decoder import TinyDecoder
from tests.engine.half import cpu_with_units
from tests.tiny_model import randomize

reference_class: Any = AutoencoderTiny  # it has no types
REQUEST = Request("red cat", seed=3, steps=2, width=64, height=72, decoder="tiny")


def reference(levels: int = 4, **changes: Any) -> Any:
    widths, blocks = (16,) * levels, tuple(range(1, levels + 1))
    settings = {"encoder_block_out_channels": widths, "decoder_block_out_channels": widths}
    settings |= {"num_encoder_blocks": blocks, "num_decoder_blocks": blocks} | changes
    made = reference_class(**settings)
    made.eval()
    randomize(made, 7)
    return made


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model with a tiny decoder that the reference wrote, encoder and all."""
    copied = tmp_path / "model"
    shutil.copytree(tiny_folder, copied)
    reference().save_pretrained(copied / "tiny_decoder")
    return copied


@torch.inference_mode()
def test_it_decodes_as_the_reference_does(folder: Path) -> None:
    theirs = reference_class.from_pretrained(folder / "tiny_decoder").eval()
    decoder = load_model(folder).tiny_decoder
    assert decoder is not None
    z_BCHW = 3 * torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))  # also what is pressed together
    wanted = theirs.decode(z_BCHW).sample
    # The same sums; weights in another layout are added up in another order, and float32 keeps 7 digits.
    assert torch.allclose(decoder(z_BCHW), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.inference_mode()
def test_without_settings_it_is_the_published_one() -> None:
    ours, theirs = TinyDecoder(TinyDecoderConfig()), reference_class().decoder
    assert TinyDecoderConfig.from_dict({"_class_name": "AutoencoderTiny"}) == TinyDecoderConfig()
    assert {name: value.shape for name, value in ours.state_dict().items()} == {
        name: value.shape for name, value in theirs.state_dict().items()
    }


def test_rows_of_both_decoders_share_their_packs_and_each_gets_its_own_picture(folder: Path) -> None:
    model = load_model(folder)
    by_vae = replace(REQUEST, decoder="vae")
    tiny, full, again = Engine(model).render([REQUEST, by_vae, REQUEST])
    # A level, where a sum in another order is rounded to the other side.
    assert np.abs(tiny.astype(int) - again).max() <= 1 < np.abs(tiny.astype(int) - full).max()
    assert np.abs(full.astype(int) - Engine(model).render([by_vae])[0]).max() <= 1
    rows = [first_row(i, request, "m", model) for i, request in enumerate((REQUEST, by_vae, REQUEST))]
    assert [[row.id for row in batch] for batch in decode_batches(rows)] == [[0, 2], [1]]


@torch.inference_mode()
@pytest.mark.parametrize("height", [9, 100])
def test_strips_give_the_picture_that_it_makes_at_once(folder: Path, height: int) -> None:
    model = load_model(folder)
    z_BCHW = torch.randn(2, 4, height, 5, generator=torch.Generator().manual_seed(0))
    at_once, in_strips = decode_tiny(model, z_BCHW), decode_tiny(model, z_BCHW, whole_pixels=7 * 5 * 64)
    # Sums of other sizes are added up in another order, and float32 keeps 7 digits.
    assert torch.allclose(in_strips, at_once, rtol=0, atol=1e-5 * float(at_once.abs().max()))


@pytest.mark.parametrize("offload", ["resident", "idle", "sequential"])
def test_every_mode_of_offload_has_it(folder: Path, offload: str) -> None:
    wanted = Engine(load_model(folder)).render([REQUEST])[0]
    found = Engine(load_model(folder, offload=offload)).render([REQUEST])[0]
    assert np.abs(wanted.astype(int) - found).max() <= 1  # a level: other convolutions round otherwise


def test_deterministic_engines_give_its_picture_bit_by_bit_whatever_is_beside_it(folder: Path) -> None:
    model = load_model(folder)
    beside = [replace(REQUEST, seed=seed, steps=3) for seed in range(3)]
    alone = Engine(model, deterministic=True).render([REQUEST])[0]
    assert np.array_equal(Engine(model, deterministic=True).render([*beside, REQUEST])[-1], alone)


def test_a_request_that_was_saved_goes_on_to_the_same_picture(folder: Path) -> None:
    model, request = load_model(folder), replace(REQUEST, steps=4)
    first, second = Engine(model), Engine(model)
    id = first.add(request)
    first.step()
    id = second.add(request, first.save(id))
    finished = [done for _ in range(3) for done in second.step()]
    assert [done.id for done in finished] == [id] and finished[0].image is not None
    assert np.array_equal(finished[0].image, Engine(model).render([request])[0])


@torch.inference_mode()
def test_in_half_precision_it_is_near_what_it_is_in_float32(folder: Path) -> None:
    z_BCHW = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(0))
    with cpu_with_units():
        exact, half = (decode_tiny(load_model(folder, dtype=dtype), z_BCHW) for dtype in ("fp32", "bf16"))
    # bfloat16 keeps 8 bits, 0.4 %, and thirty layers add up some of them.
    assert float((half - exact).abs().max() / exact.abs().max()) < 0.1


def test_a_model_without_one_refuses_it_and_says_what_to_do(tiny_folder: Path) -> None:
    engine = Engine(load_model(tiny_folder))
    with pytest.raises(InvalidRequest, match=r"decoder.*'tiny'.*has no tiny decoder.*tiny_decoder/"):
        engine.add(REQUEST)
    assert engine.idle


def test_a_folder_may_be_given_and_goes_before_the_models_own(folder: Path, tmp_path: Path) -> None:
    reference(num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(tmp_path / "other")
    decoder = load_model(folder, tiny_decoder=tmp_path / "other").tiny_decoder
    assert decoder is not None and decoder.config.blocks == (1, 1, 1, 1)


def test_what_was_written_is_what_is_loaded_by_us_and_by_the_reference(folder: Path, tmp_path: Path) -> None:
    decoder = load_model(folder).tiny_decoder
    assert decoder is not None
    write_tiny_decoder(tmp_path / "written", decoder, torch.float32)
    again = load_model(folder, tiny_decoder=tmp_path / "written").tiny_decoder
    assert again is not None and again.config == decoder.config
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), again.parameters(), strict=True))
    settings = json.loads((tmp_path / "written" / "config.json").read_text())
    theirs = reference_class(**{key: value for key, value in settings.items() if not key.startswith("_")})
    assert {name for name, _ in theirs.decoder.named_parameters()} == {name for name, _ in decoder.named_parameters()}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latent_channels": 16}, r"16 channels \(latent_channels\).*the model's have 4 at 1/8"),
        ({"num_decoder_blocks": [1, 1]}, r"at 1/2 of the size \(num_decoder_blocks\)"),
        ({"act_fn": "silu"}, r"act_fn='silu' is not supported"),
        ({"decoder_block_out_channels": [16, 32, 16, 16]}, r"one width at all levels"),
        ({"num_decoder_blocks": "many"}, r"num_decoder_blocks='many'"),
        ({"_class_name": "AutoencoderKL"}, r"_class_name='AutoencoderKL' is not supported"),
    ],
)
def test_one_that_does_not_fit_is_refused_with_its_folder(folder: Path, settings: dict[str, Any], said: str) -> None:
    path = folder / "tiny_decoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(WeightsError, match=said) as refused:
        load_model(folder)
    assert "tiny_decoder" in str(refused.value)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "tiny_decoder" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"tiny_decoder has no weights"):
        load_model(folder)


def test_the_shipped_model_has_one_that_draws_nearly_what_its_vae_draws() -> None:
    engine = Engine(load_model(shipped_model()))
    prompts = ("a red star on a blue background", "a green circle on a white background", "a yellow square on red")
    requests = [Request(prompt, seed=i, steps=12) for i, prompt in enumerate(prompts)]
    tiny = engine.render([replace(request, decoder="tiny") for request in requests])
    apart_db = [_psnr_db(*pair) for pair in zip(engine.render(requests), tiny, strict=True)]
    assert 20 < sorted(apart_db)[1] < 99  # pictures of other prompts are some 8 dB apart


def _psnr_db(one: Any, other: Any) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2)))
