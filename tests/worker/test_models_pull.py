"""Pulling from a hub, a local one: only what is needed, resumed, checked, and on the shelf whole or not at all."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from tests.worker.hub import COMMIT, LocalHub, local_hub
from worker.model_entry import ShelfError
from worker.model_hub import Hub, PullError
from worker.model_pull import pulled, pulled_model, tokenizer_of
from worker.model_shelf import Shelf
from worker.reasons import HubUnavailable
from worker.workshop import TorchOptions, open_workshop

CHUNK = 1 << 14
UNET = "unet/diffusion_pytorch_model.safetensors"


def files_of(folder: Path) -> dict[str, bytes]:
    """A folder as a repository, with what such repositories have besides."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    rubbish = {"README.md": b"# tiny", "unet/run_me.py": b"raise SystemExit", "unet/diffusion_pytorch_model.bin": b"?"}
    return files | rubbish


@pytest.fixture
def hub(tiny_folder: Path) -> Iterator[LocalHub]:
    with local_hub() as running:
        running.repositories["org/tiny"] = files_of(tiny_folder)
        yield running


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, hub: LocalHub) -> Hub:
    """The tests' environment forbids every hub (HF_HUB_OFFLINE); here the local one may be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    # What is in the library's hands when the connection breaks is lost: at most this much, by default more than a file.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    return Hub(hub.endpoint)


def pull(shelf: Shelf, hub: Hub, repository: str = "org/tiny") -> None:
    with pulled_model(shelf, repository, hub=hub) as (source, commit):
        shelf.add("tiny", source, origin=f"{repository}@{commit}", check=lambda source: None)


def test_only_what_is_needed_is_fetched_and_lands_on_the_shelf_with_where_it_is_from(
    hub: LocalHub, online: Hub, shelf: Shelf, tiny_folder: Path
) -> None:
    pull(shelf, online)
    asked = {asked.name for asked in hub.asked}
    assert UNET in asked and asked.isdisjoint({"README.md", "unet/run_me.py", "unet/diffusion_pytorch_model.bin"})
    entry = shelf.entry("tiny")
    assert entry.origin == f"org/tiny@{COMMIT}"
    assert (entry.folder / UNET).read_bytes() == (tiny_folder / UNET).read_bytes()
    assert not open_workshop({"tiny": entry.folder}, TorchOptions("cpu")).broken
    assert shelf.unfinished() == []


def test_a_token_is_not_sent_to_the_host_that_large_files_come_from(hub: LocalHub, online: Hub, shelf: Shelf) -> None:
    pull(shelf, online)
    by_host = {asked.host: asked.authorized for asked in hub.asked}
    assert by_host == {"127.0.0.1": True, "localhost": False}


def test_a_connection_that_is_cut_is_taken_up_where_it_was_cut(hub: LocalHub, online: Hub, shelf: Shelf) -> None:
    hub.faults[UNET] = [0.5]
    pull(shelf, online)
    half = len(hub.repositories["org/tiny"][UNET]) // 2
    first, second = hub.starts(UNET)
    assert first == 0 and half - CHUNK < second <= half
    assert shelf.names() == ["tiny"]


def test_an_interrupted_pull_is_gone_on_with_by_the_next_one(hub: LocalHub, online: Hub, shelf: Shelf) -> None:
    hub.faults[UNET] = [0.25, 500]
    with pytest.raises(HubUnavailable, match=r"answered 500 for org/tiny; pull again, it goes on where it stopped"):
        pull(shelf, online)
    assert shelf.names() == [] and len(shelf.unfinished()) == 1
    before = len(hub.asked)
    pull(shelf, online)
    quarter = len(hub.repositories["org/tiny"][UNET]) // 4
    again = hub.asked[before:]
    (start,) = [asked.start for asked in again if asked.name == UNET]
    assert quarter - CHUNK < start <= quarter
    # What had arrived whole is not fetched a second time: the small files came first.
    assert not {asked.name for asked in again} & {asked.name for asked in hub.asked[: before - 2]}
    assert shelf.names() == ["tiny"] and shelf.unfinished() == []


@pytest.mark.parametrize("name", [UNET, "unet/config.json"])
def test_a_file_with_another_checksum_is_refused_and_nothing_is_shelved(
    name: str, hub: LocalHub, online: Hub, shelf: Shelf
) -> None:
    hub.damaged.add(name)
    with pytest.raises(PullError, match=f"{name} of org/tiny arrived damaged: its (sha256|git SHA-1) is"):
        pull(shelf, online)
    assert shelf.names() == []
    hub.damaged.clear()
    pull(shelf, online)  # the damaged file was not kept
    assert shelf.names() == ["tiny"]


def test_what_does_not_fit_on_the_disk_is_told_before_anything_is_fetched(
    hub: LocalHub, online: Hub, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    with pytest.raises(PullError, match=r"\d{7} bytes are still to come and .* has 1048576 free; make room"):
        pull(shelf, online)
    assert hub.asked == []


def test_a_part_that_is_longer_than_its_file_is_fetched_anew(hub: LocalHub, online: Hub, shelf: Shelf) -> None:
    hub.faults[UNET] = [500]
    with pytest.raises(HubUnavailable):
        pull(shelf, online)
    (folder,) = shelf.unfinished()
    (folder / f"{UNET}.part").write_bytes(bytes(len(hub.repositories["org/tiny"][UNET]) + 1))
    pull(shelf, online)
    assert hub.starts(UNET)[-1] == 0 and shelf.names() == ["tiny"]


@pytest.mark.parametrize(
    ("repository", "revision", "sentence"),
    [
        ("org/nothing", None, "has no model 'org/nothing', or does not show it; check the id"),
        ("org/tiny", "v9", "org/tiny has no revision 'v9'"),
        ("no id at all", None, "'no id at all' is no id of a model; it has the form org/name"),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(
    repository: str, revision: str | None, sentence: str, online: Hub, shelf: Shelf
) -> None:
    with (
        pytest.raises(PullError, match=sentence) as caught,
        pulled_model(shelf, repository, revision, hub=online),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_away_is_one_sentence(online: Hub, shelf: Shelf) -> None:
    with (
        pytest.raises(HubUnavailable, match=r"http://127\.0\.0\.1:1 cannot be reached"),
        pulled_model(shelf, "org/tiny", hub=Hub("http://127.0.0.1:1")),
    ):
        pass


def test_offline_is_one_sentence(hub: LocalHub, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with (
        pytest.raises(PullError, match="HF_HUB_OFFLINE is set, so no hub is asked"),
        pulled_model(shelf, "org/tiny", hub=Hub(hub.endpoint)),
    ):
        pass
    assert hub.asked == []


def test_a_server_that_is_no_hub_is_one_sentence(hub: LocalHub, online: Hub, shelf: Shelf) -> None:
    hub.pages.add("org/page")
    with (
        pytest.raises(PullError, match="does not answer like a model hub; check HF_ENDPOINT"),
        pulled_model(shelf, "org/page", hub=online),
    ):
        pass


def test_two_processes_do_not_pull_the_same_at_once(online: Hub, shelf: Shelf) -> None:
    with (
        pulled(shelf, "org/tiny", tokenizer_of, hub=online),
        pytest.raises(ShelfError, match="another process works in"),
    ):
        pull(shelf, online)


def test_a_single_file_comes_with_its_repository_s_tokenizer(
    hub: LocalHub, online: Hub, shelf: Shelf, tiny_file: Path, tiny_folder: Path
) -> None:
    tokenizer = {path.name: path.read_bytes() for path in (tiny_folder / "tokenizer").iterdir()}
    hub.repositories["org/file"] = {"tiny.safetensors": tiny_file.read_bytes(), **tokenizer, "x/other.ckpt": b"?"}
    pull(shelf, online, "org/file")
    assert not open_workshop({"tiny": shelf.folder / "tiny"}, TorchOptions("cpu")).broken
    assert "x/other.ckpt" not in {asked.name for asked in hub.asked}


def run_on_terminal(words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """A command whose standard error is a terminal; its exit code and what the terminal showed."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "models", *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=its)
    os.close(its)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def test_the_command_pulls_with_a_bar_on_a_terminal_and_in_silence_elsewhere(hub: LocalHub, shelf: Shelf) -> None:
    """Processes of their own, in the environment that people have: HF_ENDPOINT set, HF_HUB_OFFLINE not."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    code, shown = run_on_terminal(["pull", "org/tiny", "--name", "first"], environment)
    assert code == 0, shown
    assert "diffusion_pytorch_model.safetensors" in shown and "100%" in shown
    command = [sys.executable, "-c", "from jobs.cli import main; main()", "models", "pull", "org/nothing"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert shelf.names() == ["first"]
