"""What lies on the disk is its owner's alone, and a night leaves nothing beside it."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs import Client, Settings, State
from jobs.storage import DirStorage
from tests.integration.processes import PATIENCE_S, fake_worker, stop, tail, wait_until


@pytest.fixture
def open_umask() -> Iterator[None]:
    """As careless as a machine can be set."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.usefixtures("open_umask")
def test_after_a_night_everything_is_in_the_home_and_its_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a worker that is killed and another that is told to leave; prompts and pictures are private."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    settings, log = Settings(home=tmp_path / "home"), tmp_path / "worker.log"
    quick = {"lease_s": 2.0, "beat_s": 0.5, "poll_s": 0.2, "concurrency": 4}
    with Client(settings) as client:
        jobs = client.submit_many([{"prompt": "x", "steps": 60, "init_image": picture()} for _ in range(8)])
        with fake_worker(settings, log, step_s=0.02, **quick) as killed:
            wait_until(lambda: client.counts()[State.running] > 0, "a running job", log)
            killed.kill()
            killed.wait()
        with fake_worker(settings, log, step_s=0.0, **quick) as worker:
            assert {view.state for view in client.wait(jobs, PATIENCE_S)} == {State.succeeded}, tail(log)
            stop(worker, log)
        left = sorted(settings.home.rglob("*"))
        assert [path for path in (settings.home, *left) if path.is_dir() and mode(path) != 0o700] == []
        assert [path for path in left if path.is_file() and mode(path) != 0o600] == []
        assert [path for path in left if path.name.startswith(".") or path.suffix == ".part"] == []
        assert sum(path.name.endswith(".png") for path in left) == 8 + 1
    assert list(temporary.iterdir()) == []


@pytest.mark.usefixtures("open_umask")
def test_a_database_elsewhere_is_its_owners_alone_from_its_first_byte(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    file = tmp_path / "elsewhere" / "jobs.db"
    with Client(Settings(home=tmp_path / "home", database_url=f"sqlite:///{file}")) as client:
        client.submit("x")
        assert {path.name: oct(mode(path)) for path in file.parent.iterdir()} == {
            f"jobs.db{ending}": "0o600" for ending in ("", "-wal", "-shm")
        }


def test_a_database_that_is_there_keeps_the_mode_that_its_owner_chose(tmp_path: Path) -> None:
    file = tmp_path / "jobs.db"
    file.touch()
    file.chmod(0o640)
    with Client(Settings(home=tmp_path / "home", database_url=f"sqlite:///{file}")) as client:
        client.submit("x")
    assert mode(file) == 0o640


@pytest.mark.usefixtures("open_umask")
def test_an_object_is_its_owners_alone_and_is_never_seen_in_part(tmp_path: Path) -> None:
    storage = DirStorage(tmp_path / "storage")
    storage.put("images/a/b/0.png", b"x", "image/png")
    found = sorted((tmp_path / "storage").rglob("*"))
    assert [oct(mode(path)) for path in found] == ["0o700", "0o700", "0o700", "0o600"]
    assert mode(tmp_path / "storage") == 0o700
