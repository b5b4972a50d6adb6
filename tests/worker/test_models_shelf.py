"""The shelf: what is added is whole and sound, is served as it was added, and nothing else is ever seen."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import Settings
from sd_engine import Engine, load_model, shipped_model
from tests.worker.models_helpers import draw, on_disk, ran, refused, run, torn
from worker.demo import embedded
from worker.model_entry import MANIFEST, ShelfError, Source, read_entry, reason, source_at
from worker.model_shelf import Shelf, served
from worker.workshop import TorchOptions, open_workshop


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: object, **options: object) -> None:
        raise AssertionError(f"the network was asked for: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)


def test_an_added_file_is_served_with_its_tokenizer_and_draws_what_its_folder_draws_without_a_network(
    tiny_file: Path, tiny_folder: Path, no_network: None
) -> None:
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder)
    tiny_file.unlink()
    models = served(Settings())
    assert list(models) == ["nightshift-mini", "tiny"]
    ours, theirs = draw({"tiny": models["tiny"]}, "tiny"), draw({"tiny": tiny_folder}, "tiny")
    # The same weights through the same kernels: not a bit may differ.
    assert (ours == theirs).all()


def test_an_added_folder_is_a_diffusers_folder_without_what_nobody_loads(
    tiny_folder: Path, tmp_path: Path, shelf: Shelf
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "more")
    (folder / "unet" / "run_me.py").write_text("raise SystemExit")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    ran("add", "tiny", folder)
    there = {path.name for path in (shelf.folder / "tiny").rglob("*")}
    assert "diffusion_pytorch_model.safetensors" in there and not {"run_me.py", "diffusion_pytorch_model.bin"} & there
    assert source_at(shelf.folder / "tiny") == Source(shelf.folder / "tiny")


def test_a_file_is_linked_on_one_file_system_and_copied_where_that_cannot_be(
    tiny_folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    ran("add", "linked", tiny_folder)
    assert (shelf.folder / "linked" / "unet" / weights.name).samefile(weights)

    def elsewhere(*arguments: object, **options: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", elsewhere)
    ran("add", "copied", tiny_folder)
    copy = shelf.folder / "copied" / "unet" / weights.name
    assert not copy.samefile(weights) and copy.read_bytes() == weights.read_bytes()


def test_a_model_that_is_only_linked_to_stays_where_it_is_even_when_it_is_removed(
    tiny_file: Path, tiny_folder: Path, shelf: Shelf
) -> None:
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder, "--link")
    entry = shelf.entry("tiny")
    assert entry.linked and entry.source.path == tiny_file
    assert {path.name for path in entry.folder.iterdir()} == {MANIFEST, "tokenizer"}
    assert not open_workshop({"tiny": entry.folder}, TorchOptions("cpu")).broken
    ran("remove", "tiny")
    assert tiny_file.is_file() and on_disk(shelf) == []


def test_what_a_model_was_added_with_is_what_it_is_loaded_with(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path, shelf: Shelf
) -> None:
    (tmp_path / "words").mkdir()
    save_file({"emb_params": torch.ones(2, 32)}, tmp_path / "words" / "my-cat.safetensors")
    (tmp_path / "words" / "notes.txt").write_text("private")
    options = ("--prediction", "v_prediction", "--zero-snr", "--vae", tiny_folder, "--embeddings", tmp_path / "words")
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder, *options)
    source = shelf.entry("tiny").source
    assert (source.prediction, source.zero_snr, source.ema) == ("v_prediction", True, False)
    assert source.vae == shelf.folder / "tiny" / "extras" / "vae"
    assert not (shelf.folder / "tiny" / "embeddings" / "notes.txt").exists()
    engine = open_workshop({"tiny": shelf.folder / "tiny"}, TorchOptions("cpu")).make_engine()
    assert isinstance(engine, Engine)
    model = engine.models["tiny"]
    assert (model.schedule.prediction, model.schedule.zero_snr) == ("v_prediction", True)
    assert list(model.embeddings) == ["my-cat"]


def test_the_tokenizer_of_a_model_on_the_shelf_serves_another(tiny_file: Path, tiny_folder: Path, shelf: Shelf) -> None:
    ran("add", "first", tiny_folder)
    ran("add", "second", tiny_file, "--tokenizer", "first")
    ran("add", "third", tiny_file, "--tokenizer", "second")
    ran("remove", "first")
    ran("remove", "second")
    assert (shelf.folder / "third" / "tokenizer" / "vocab.json").is_file()


def test_a_file_without_a_tokenizer_is_refused_with_the_remedy(tiny_file: Path, shelf: Shelf) -> None:
    said = refused("add", "tiny", tiny_file)
    assert str(tiny_file) in said and "--tokenizer DIR" in said and "openai/clip-vit-large-patch14" in said
    assert on_disk(shelf) == []


def test_a_tokenizer_beside_a_file_is_taken(tiny_file: Path, tiny_folder: Path, shelf: Shelf) -> None:
    shutil.copytree(tiny_folder / "tokenizer", tiny_file.parent / "tokenizer")
    ran("add", "tiny", tiny_file)
    assert shelf.entry("tiny").source.tokenizer == shelf.folder / "tiny" / "tokenizer"


def test_a_tokenizer_that_is_nowhere_is_refused_with_what_there_could_be(tiny_file: Path, tmp_path: Path) -> None:
    assert "no folder with vocab.json" in refused("add", "tiny", tiny_file, "--tokenizer", tmp_path / "none")


def _incomplete(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if key != "conv_in.weight"}, path)


def _not_finite(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, path)


def _foreign(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [(torn, "whole"), (_incomplete, "conv_in.weight"), (_not_finite, "decoder.conv_out.bias"), (_foreign, "Flux")],
)
def test_a_wrong_model_is_refused_in_the_engine_s_words_and_leaves_nothing(
    spoil: Any, sentence: str, tiny_folder: Path, tmp_path: Path, shelf: Shelf
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "wrong")
    spoil(folder)
    assert sentence in refused("add", "wrong", folder)
    assert on_disk(shelf) == []


def test_a_file_that_its_names_give_away_is_refused_before_anything_is_put_anywhere(
    tiny_folder: Path, tmp_path: Path, shelf: Shelf
) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8)}, tmp_path / "style.safetensors")
    said = refused("add", "style", tmp_path / "style.safetensors", "--tokenizer", tiny_folder)
    assert f"{tmp_path / 'style.safetensors'} is a LoRA" in said and not shelf.folder.exists()


def test_what_only_the_numbers_show_is_told_of_the_file_that_was_given(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_file)
    tensors["first_stage_model.decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, tiny_file)
    said = refused("add", "wrong", tiny_file, "--tokenizer", tiny_folder)
    assert said.startswith(f"Error: {tiny_file}: first_stage_model.decoder.conv_out.bias")
    vae, folder = tmp_path / "other.vae.safetensors", shutil.copytree(tiny_folder, tmp_path / "wrong")
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("first_stage")}, vae)
    assert refused("add", "wrong", tiny_folder, "--vae", vae).startswith(f"Error: {vae}: first_stage_model.decoder")
    _not_finite(folder)
    assert refused("add", "wrong", folder).startswith(f"Error: {folder}/vae/diffusion_pytorch_model.safetensors: ")


def test_a_model_is_checked_in_its_own_dtype(tiny_folder: Path, tmp_path: Path, shelf: Shelf) -> None:
    """A number that float16 does not have is none that is wrong."""
    folder = shutil.copytree(tiny_folder, tmp_path / "wide")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"][0] = 1e6
    save_file(tensors, path)
    ran("add", "wide", folder)
    assert shelf.names() == ["wide"]


def test_a_tokenizer_of_another_model_is_refused(tiny_folder: Path, shelf: Shelf) -> None:
    said = refused("add", "mini", shipped_model(), "--tokenizer", tiny_folder)
    assert f"the tokenizer has 518 tokens, the text encoder of {shipped_model()} 609" in said
    assert on_disk(shelf) == []


def test_a_folder_s_own_embeddings_come_with_it(tiny_folder: Path, tmp_path: Path, shelf: Shelf) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "taught")
    (folder / "embeddings").mkdir()
    save_file({"emb_params": torch.ones(2, 32)}, folder / "embeddings" / "my-cat.safetensors")
    ran("add", "taught", folder)
    shutil.rmtree(folder)
    source = shelf.entry("taught").source
    assert list(load_model(source.path, **source.options()).embeddings) == ["my-cat"]


def test_where_a_disk_is_full_is_told_not_what_was_copied() -> None:
    assert (
        reason(OSError(errno.ENOSPC, "No space left on device", "from", None, "to")) == "No space left on device (to)"
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("a/b", "no name for a model"), (".hidden", "no name"), ("nightshift-mini", "itself uses"), ("tiny", "already")],
)
def test_a_name_that_is_taken_or_not_allowed_is_refused(name: str, sentence: str, tiny_folder: Path) -> None:
    ran("add", "tiny", tiny_folder)
    assert sentence in refused("add", name, tiny_folder)


def test_what_is_being_added_is_not_seen_and_what_a_killed_process_left_is_cleared(
    tiny_folder: Path, shelf: Shelf
) -> None:
    left = shelf.folder / ".adding-tiny"
    (left / "unet").mkdir(parents=True)
    (left / MANIFEST).write_text("{}")
    (left / "unet" / "old.bin").write_text("old")
    seen: list[list[str]] = []
    shelf.add("tiny", Source(tiny_folder), origin="a test", check=lambda source: seen.append(shelf.names()))
    assert seen == [[]] and shelf.names() == ["tiny"]
    assert on_disk(shelf) == ["tiny"] and not (shelf.folder / "tiny" / "unet" / "old.bin").exists()


def test_two_processes_do_not_add_the_same_name_at_once(tiny_folder: Path, shelf: Shelf) -> None:
    def meanwhile(source: Source) -> None:
        with pytest.raises(ShelfError, match="another process works in"):
            shelf.add("tiny", Source(tiny_folder), origin="another", check=lambda source: None)

    shelf.add("tiny", Source(tiny_folder), origin="a test", check=meanwhile)
    assert shelf.entry("tiny").origin == "a test"


def test_the_shelf_is_for_its_owner_alone(tiny_folder: Path, shelf: Shelf) -> None:
    ran("add", "tiny", tiny_folder)
    for folder in (shelf.folder.parent, shelf.folder, shelf.folder / "tiny"):
        assert folder.stat().st_mode & 0o077 == 0


def test_the_worker_serves_what_it_is_told_and_fails_the_jobs_of_what_is_not_there(
    tiny_folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran("add", "tiny", tiny_folder)
    monkeypatch.setenv("NIGHTSHIFT_MODELS", "tiny,never")
    models = served(Settings())
    assert models == {"tiny": shelf.folder / "tiny", "never": shelf.folder / "never"}
    workshop = open_workshop(models, TorchOptions("cpu"))
    assert workshop.models == ("tiny", "never") and "no model" in workshop.broken["never"]


def test_a_manifest_that_cannot_be_read_fails_its_own_jobs_and_no_others(tiny_folder: Path, shelf: Shelf) -> None:
    ran("add", "good", tiny_folder)
    ran("add", "torn", tiny_folder)
    (shelf.folder / "torn" / MANIFEST).write_text("{")
    workshop = open_workshop({name: shelf.folder / name for name in shelf.names()}, TorchOptions("cpu"))
    assert list(workshop.broken) == ["torn"] and "remove the model and add it again" in workshop.broken["torn"]


def test_the_demo_finds_a_model_of_the_usual_shelf_although_its_home_is_its_own(
    tmp_path: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(embedded(tmp_path / "demo").models) == ["nightshift-mini"]
    monkeypatch.setenv("NIGHTSHIFT_MODELS", "tiny")
    assert embedded(tmp_path / "demo").models == {"tiny": shelf.folder / "tiny"}


def test_adding_what_no_worker_will_serve_says_so(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_MODELS", "nightshift-mini")
    result = run("add", "tiny", tiny_folder)
    assert result.exit_code == 0 and "NIGHTSHIFT_MODELS is set and does not name tiny" in result.stderr


def test_a_manifest_of_another_form_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"form": 2}')
    with pytest.raises(ShelfError, match="its form is 2, known is 1"):
        read_entry(tmp_path)
