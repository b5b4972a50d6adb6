"""The tiny decoder of a model on the shelf: found beside it or given, served, and converted with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny

from sd_engine import Engine, Request, load_model
from tests.worker.models_helpers import on_disk, ran, refused
from worker.model_files import TINY_DECODER
from worker.model_shelf import Shelf
from worker.workshop import TorchOptions, open_workshop

reference_class: Any = AutoencoderTiny  # it has no types


def drawn_by_tiny_decoder(shelf: Shelf) -> bool:
    """Whether the model `tiny` of the shelf takes and draws a job that asks for that."""
    engine = open_workshop({"tiny": shelf.folder / "tiny"}, TorchOptions("cpu")).make_engine()
    assert isinstance(engine, Engine)
    (picture,) = engine.render([Request("a red cat", steps=1, height=64, width=64, seed=7, decoder="tiny")])
    return picture.shape == (64, 64, 3)


def test_a_tiny_decoder_beside_a_file_is_taken_along(tiny_file: Path, tiny_folder: Path, shelf: Shelf) -> None:
    reference_class().save_pretrained(tiny_file.parent / TINY_DECODER)
    (tiny_file.parent / TINY_DECODER / "notes.txt").write_text("private")
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder)
    taken = {path.name for path in (shelf.folder / "tiny" / "extras" / TINY_DECODER).iterdir()}
    assert taken == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert drawn_by_tiny_decoder(shelf)


def test_a_tiny_decoder_that_is_given_goes_before_the_model_s_own(
    tiny_folder: Path, tmp_path: Path, shelf: Shelf
) -> None:
    folder, given = shutil.copytree(tiny_folder, tmp_path / "model"), tmp_path / "given"
    reference_class().save_pretrained(folder / TINY_DECODER)
    reference_class(num_decoder_blocks=(1, 1, 1, 1)).save_pretrained(given, safe_serialization=False)
    own = (folder / TINY_DECODER / "diffusion_pytorch_model.safetensors").read_bytes()
    ran("add", "tiny", folder, "--tiny-decoder", given)
    source = shelf.entry("tiny").source
    assert source.tiny_decoder == shelf.folder / "tiny" / "extras" / TINY_DECODER
    assert drawn_by_tiny_decoder(shelf)
    assert (folder / TINY_DECODER / "diffusion_pytorch_model.safetensors").read_bytes() == own
    ran("convert", "tiny", tmp_path / "out", "--dtype", "fp16")
    assert json.loads((tmp_path / "out" / TINY_DECODER / "config.json").read_text())["num_decoder_blocks"] == [1] * 4
    decoder = load_model(tmp_path / "out").tiny_decoder
    assert decoder is not None and len(list((tmp_path / "out" / TINY_DECODER).iterdir())) == 2


def test_a_folder_that_is_no_tiny_decoder_is_refused(tiny_folder: Path, tmp_path: Path, shelf: Shelf) -> None:
    said = refused("add", "tiny", tiny_folder, "--tiny-decoder", tmp_path)
    assert f"Error: {tmp_path}: tiny_decoder/ has no weights" in said
    reference_class(latent_channels=16).save_pretrained(tmp_path / "sd3")
    said = refused("add", "tiny", tiny_folder, "--tiny-decoder", tmp_path / "sd3")
    assert f"Error: {tmp_path / 'sd3'} decodes latents of 16 channels" in said
    assert on_disk(shelf) == []


def test_a_tiny_decoder_beside_a_file_is_refused_with_the_path_that_it_was_found_at(
    tiny_file: Path, tiny_folder: Path, shelf: Shelf
) -> None:
    reference_class(latent_channels=16).save_pretrained(tiny_file.parent / TINY_DECODER)
    said = refused("add", "tiny", tiny_file, "--tokenizer", tiny_folder)
    assert f"Error: {tiny_file.parent / TINY_DECODER} decodes latents of 16 channels" in said
    assert on_disk(shelf) == []


def test_that_of_a_model_that_is_only_linked_to_is_taken_all_the_same(
    tiny_file: Path, tiny_folder: Path, shelf: Shelf
) -> None:
    reference_class().save_pretrained(tiny_file.parent / TINY_DECODER)
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder, "--link")
    shutil.rmtree(tiny_file.parent / TINY_DECODER)
    assert ran("verify", "tiny") == "tiny: sound\n"
    assert drawn_by_tiny_decoder(shelf)


def test_a_converted_file_takes_that_of_another_model(tiny_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    reference_class().save_pretrained(other / TINY_DECODER)
    ran("convert", tiny_file, tmp_path / "out", "--tokenizer", tiny_folder, "--tiny-decoder", other)
    assert load_model(tmp_path / "out").tiny_decoder is not None
