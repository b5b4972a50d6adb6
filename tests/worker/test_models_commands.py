"""The models command: list, inspect, verify and convert; and all of them as people run them."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worker.models_helpers import draw, ran, refused, run, torn
from worker.model_entry import MANIFEST
from worker.model_shelf import Shelf
from worker.models_cli import models


def test_a_listed_model_says_what_is_wrong_with_it_and_who_serves_it(
    tiny_folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("good", "gone", "torn"):
        ran("add", name, tiny_folder)
    (shelf.folder / "gone" / "vae" / "config.json").unlink()
    (shelf.folder / "torn" / MANIFEST).write_text('{"form": 1}')
    monkeypatch.setenv("NIGHTSHIFT_MODELS", f"good,other={tiny_folder},never")
    found = {line["name"]: line for line in json.loads(ran("list", "--json"))}
    assert {name: line["served"] for name, line in found.items()} == {
        "nightshift-mini": False, "good": True, "gone": False, "torn": False, "other": True, "never": True,
    }  # fmt: skip
    assert found["good"]["state"] == "ready" and found["good"]["kind"] == "folder"
    assert found["good"]["bytes"] == shelf.entry("good").size > 1_000_000
    assert "config.json is gone" in found["gone"]["state"]
    assert "cannot be read (lacks 'source')" in found["torn"]["state"]
    assert "no model 'never' on the shelf" in found["never"]["state"]
    table = ran("list").splitlines()
    assert table[0].split() == ["name", "kind", "size", "served", "state", "path"] and len(table) == 7


def test_what_a_killed_process_left_is_listed(tiny_folder: Path, shelf: Shelf) -> None:
    for left in (".adding-big", ".removing-old-17", ".pulling-org--name@0123"):
        (shelf.folder / left).mkdir(parents=True)
    said = run("list").stderr.splitlines()
    assert [line.partition(" (")[0] for line in said] == [
        f"unfinished: {shelf.folder / '.pulling-org--name@0123'}",
        f"left over: {shelf.folder / '.adding-big'}",
        f"left over: {shelf.folder / '.removing-old-17'}",
    ]


def test_verify_finds_a_single_changed_bit_and_says_it_in_a_sentence(tiny_folder: Path, shelf: Shelf) -> None:
    ran("add", "good", tiny_folder)
    ran("add", "bad", tiny_folder)
    assert ran("verify").splitlines() == ["bad: sound", "good: sound"]
    path = shelf.folder / "bad" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    path.unlink()  # it is the same file as the other's
    content[-1] ^= 1
    path.write_bytes(content)
    result = run("verify")
    assert result.exit_code == 1 and result.stdout == "good: sound\n"
    assert result.stderr == f"bad: {path} is not what was added; add the model again\n"


def test_verify_reads_what_was_put_beside_a_model_later(tiny_folder: Path, shelf: Shelf) -> None:
    ran("add", "tiny", tiny_folder)
    (shelf.folder / "tiny" / "embeddings").mkdir()
    (shelf.folder / "tiny" / "embeddings" / "torn.pt").write_bytes(b"torn")
    result = run("verify")
    assert result.exit_code == 1 and "torn.pt is not a whole checkpoint" in result.stderr


def test_a_model_whose_files_cannot_all_be_removed_is_gone_at_once_and_the_rest_is_listed(
    tiny_folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran("add", "tiny", tiny_folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _not_permitted)
        assert "tiny cannot be removed: Operation not permitted" in refused("remove", "tiny")
    assert shelf.names() == [] and str(shelf.left_over()[0]) in run("list").stderr


def _not_permitted(*arguments: object, **options: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted", "unet")


def test_verify_and_inspect_take_any_path(tiny_folder: Path, tmp_path: Path) -> None:
    assert ran("verify", tiny_folder) == f"{tiny_folder}: sound\n"
    text = ran("inspect", tiny_folder)
    assert "diffusers folder" in text and text.splitlines()[-1].split() == ["loadable", "yes"]
    found = json.loads(ran("inspect", tiny_folder, "--json"))
    assert found["loadable"] and {part["component"] for part in found["parts"]} == {"text_encoder", "unet", "vae"}
    folder = shutil.copytree(tiny_folder, tmp_path / "wrong")
    torn(folder)
    for command in ("verify", "inspect"):
        result = run(command, folder)
        assert result.exit_code == 1 and "whole" in result.output
    assert "no model 'nothing-here' on the shelf" in refused("inspect", "nothing-here")


def test_verify_reads_the_shelf_wherever_it_is_called_and_any_path_to_a_model_on_it(
    tiny_file: Path, tiny_folder: Path, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder)
    monkeypatch.chdir(shelf.folder)  # there a name on the shelf is a path, too
    assert ran("verify") == "tiny: sound\n"
    assert ran("verify", "tiny") == "tiny: sound\n"
    assert json.loads(ran("inspect", shelf.folder / "tiny", "--json"))["layout"] == "single file"


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("convert", "nightshift-mini")])
def test_a_path_that_the_system_refuses_is_one_sentence(command: tuple[str, ...]) -> None:
    assert refused(*command, "a" * 300).startswith("Error: ")


def test_the_shipped_model_can_be_looked_at_by_its_name() -> None:
    assert json.loads(ran("inspect", "nightshift-mini", "--json"))["loadable"]


def test_convert_writes_a_folder_that_draws_and_replaces_one_only_when_told(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran("add", "tiny", tiny_file, "--tokenizer", tiny_folder)
    ran("convert", "tiny", out)
    assert (draw({"x": out}, "x") == draw({"x": tiny_folder}, "x")).all()  # the same weights, the same kernels
    assert "--force" in refused("convert", "tiny", out, "--dtype", "fp16")
    ran("convert", tiny_file, out, "--tokenizer", "tiny", "--dtype", "fp16", "--force")
    assert json.loads(ran("inspect", out, "--json"))["parts"][0]["dtypes"].keys() == {"fp16"}
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_convert_never_replaces_what_is_no_model(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_text("precious")
    assert "no diffusers folder" in refused("convert", tiny_folder, tmp_path / "photos", "--force")
    assert (tmp_path / "photos" / "me.jpg").read_text() == "precious"


def test_a_place_that_cannot_be_written_is_told(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("precious")
    assert "file/out cannot be written" in refused("convert", tiny_folder, tmp_path / "file" / "out")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "the folder that you are in" in refused("convert", tiny_folder, ".")


def test_a_failed_conversion_leaves_the_old_one(tiny_folder: Path, tmp_path: Path) -> None:
    wrong, out = shutil.copytree(tiny_folder, tmp_path / "wrong"), shutil.copytree(tiny_folder, tmp_path / "out")
    torn(wrong)
    refused("convert", wrong, out, "--force")
    assert not read_problems(out) and sorted(tmp_path.glob(".out*")) == []


def read_problems(folder: Path) -> list[str]:
    return list(json.loads(ran("inspect", folder, "--json"))["problems"])


def test_the_installed_command_removes_and_says_when_there_is_nothing_to_remove(tiny_folder: Path) -> None:
    """Once as people run it: processes of their own, through the console script's entry point."""
    ran("add", "tiny", tiny_folder)
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "models", "remove", "tiny"]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert (first.returncode, first.stdout, first.stderr) == (0, "tiny is removed\n", "")
    assert second.returncode == 2 and second.stderr.startswith("Error: there is no model 'tiny' on the shelf")


@pytest.mark.parametrize("command", sorted(models.commands))
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"nightshift models {command}" in ran(command, "--help").partition("Example")[2]
