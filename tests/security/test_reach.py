"""Nothing that a job says is ever opened as a path or fetched as a URL, and no storage key leads out of the storage."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from jobs import Client, InvalidSpec, Settings, State, StorageError
from jobs.bulkfile import read_bulk
from jobs.errors import InvalidKey
from jobs.fields import PICTURES
from jobs.models import image, job
from jobs.spec import read_spec
from jobs.storage import DirStorage, check_key
from jobs.store import Store
from tests.integration.processes import PATIENCE_S, fake_worker, stop, tail, wait_until
from tests.security.watching import Watched, watching
from worker.translate import to_requests

URLS = (
    "http://169.254.169.254/latest/meta-data/",
    "https://example.org/a.png",
    "HTTP://127.0.0.1:{port}/a.png",
    "http://[::ffff:127.0.0.1]:{port}/a.png",
    "http://2130706433:{port}/a.png",
    "ftp://127.0.0.1:{port}/a.png",
    "gopher://127.0.0.1:{port}/_x",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "s3://bucket/a.png",
    "//127.0.0.1/share/a.png",
    "///etc/passwd",
    "\\\\127.0.0.1\\share\\a.png",
    "data://text/plain,x",
)
PATHS = (
    "/etc/passwd",
    "../../../../etc/passwd",
    "~/.ssh/id_rsa",
    "inputs/../../../etc/passwd",
    "images/x/y/0.png",
    "/dev/zero",
    "/proc/self/environ",
    "C:\\Windows\\win.ini",
    f"inputs/{'0' * 64}.png/../../secret.png",
    f"inputs/{'0' * 64}.gif",
    f"inputs/{'G' * 64}.png",
)


@pytest.fixture
def listener() -> Iterator[int]:
    """A port on which nobody must knock."""
    knocked = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue
                knocked.set()

        thread = threading.Thread(target=listen)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        thread.join()
    assert not knocked.is_set(), "somebody fetched what a job named"


@pytest.mark.parametrize("field", PICTURES)
def test_a_url_is_refused_wherever_a_picture_may_stand(
    settings: Settings, tmp_path: Path, listener: int, field: str
) -> None:
    bulk = tmp_path / "jobs.jsonl"
    for url in (each.format(port=listener) for each in URLS):
        others = {} if field == "init_image" else {"init_image": b"x"}
        with (
            watching() as seen,
            Client(settings) as client,
            pytest.raises(InvalidSpec, match=f"{field}: .* is a URL|{field}: is a URL"),
        ):
            client.submit({"prompt": "x", field: url} | others)
        assert_nothing_named(seen, url)
        bulk.write_text(json.dumps({"prompt": "x", "init_image": url, field: url}))
        with watching() as seen:
            (row,) = read_bulk(bulk)
        assert row.spec is None and any("is a URL" in str(error) for error in row.errors)
        assert_nothing_named(seen, url)


def assert_nothing_named(seen: Watched, text: str) -> None:
    """No file of that name was opened, nothing connected to, no name resolved."""
    assert seen.connected == [], seen.connected
    tail = text.replace("\\", "/").rsplit("/", 1)[-1]
    assert not [path for path in seen.opened if tail and path.endswith(f"/{tail}")]


def put_by_hand(settings: Settings, spec: dict[str, object]) -> UUID:
    """A row as somebody with access to the database could write it."""
    with Client(settings) as client:
        view = client.submit("a red star", steps=1)
    store = Store.open(settings.database_url)
    with store.engines.writer.begin() as connection:
        stored = json.loads(connection.scalar(sa.select(job.c.spec).where(job.c.id == view.id)) or "")
        connection.execute(sa.update(job).where(job.c.id == view.id).values(spec=json.dumps(stored | spec)))
    store.close()
    return view.id


def test_a_row_written_by_hand_makes_a_worker_open_and_fetch_nothing(
    settings: Settings, tmp_path: Path, listener: int
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"\x89PNG")
    named = [*(url.format(port=listener) for url in URLS), *PATHS, str(secret), f"../{secret.name}"]
    ids = [put_by_hand(settings, {"init_image": source}) for source in named]
    ids += [put_by_hand(settings, {"init_image": f"inputs/{'0' * 64}.png", "mask": str(secret)})]
    log = tmp_path / "worker.log"
    with Client(settings) as client, fake_worker(settings, log, step_s=0.0, concurrency=8) as worker:
        wait_until(lambda: all(client.get(id).error for id in ids), "a reason for each", log)
        refused = [client.get(id) for id in ids]
        # What no version can read waits for another one a few times, and then fails.
        assert {view.state for view in refused} <= {State.failed, State.queued} and not any(v.images for v in refused)
        good = client.submit("a red star", steps=1)
        assert client.wait(good, PATIENCE_S).state is State.succeeded
        stop(worker, log)


@pytest.mark.parametrize("source", [*URLS, *PATHS])
def test_the_way_from_a_stored_spec_to_the_engine_asks_the_storage_for_our_own_keys_alone(
    tmp_path: Path, source: str
) -> None:
    storage = DirStorage(tmp_path / "storage")
    with watching() as seen:
        try:
            to_requests(read_spec({"prompt": "x", "seed": 1, "init_image": source}), storage)
        except Exception as error:
            assert not isinstance(error, OSError)
        else:
            raise AssertionError("it was taken")
    assert seen.connected == [] and [path for path in seen.opened if not path.startswith(sys.prefix)] == []


KEYS = st.text(max_size=80) | st.from_regex(r"[A-Za-z0-9./_~\\-]{1,60}", fullmatch=True) | st.sampled_from(PATHS)


@effort(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(KEYS)
def test_whatever_the_key_nothing_outside_the_root_is_touched(tmp_path: Path, key: str) -> None:
    root = tmp_path / "root"
    storage = DirStorage(root)
    calls: tuple[Callable[[], object], ...] = (
        lambda: storage.put(key, b"x", "image/png"),
        lambda: storage.get(key),
        lambda: storage.exists(key),
        lambda: storage.url(key),
        lambda: storage.delete(key),
    )
    for call in calls:
        with watching() as seen, contextlib.suppress(StorageError):  # InvalidKey, or a folder of that name
            call()
        assert all(Path(os.path.realpath(path)).is_relative_to(root) for path in seen.opened if path != str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


@given(st.text(max_size=80))
def test_no_name_of_a_batch_or_a_job_becomes_a_part_of_a_key(name: str) -> None:
    """Keys are made of ids and hashes; what people choose is in the database alone."""
    try:
        kept = check_key(f"images/{name}/0.png")
    except InvalidKey:
        return
    assert ".." not in kept.split("/")


def test_a_key_tampered_with_in_the_database_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    log = tmp_path / "worker.log"
    with Client(settings) as client, closing(Store.open(settings.database_url)) as store:
        view = client.submit("a red star", steps=1)
        with fake_worker(settings, log, step_s=0.0, concurrency=2, until_empty=True) as worker:
            assert worker.wait(PATIENCE_S) == 0, tail(log)
        assert client.image_bytes(view.id)
        for key in ("../../secret.png", "/etc/passwd", "images/../../secret.png", "file:///etc/passwd", "", "a\\b"):
            with store.engines.writer.begin() as connection:
                connection.execute(sa.update(image).where(image.c.job_id == view.id).values(key=key))
            for read in (client.image_bytes, client.image_url):
                with pytest.raises(InvalidKey):
                    read(view.id)


def test_links_planted_in_the_storage_lead_nowhere_for_any_call(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    storage = DirStorage(tmp_path / "root")
    (tmp_path / "root" / "inputs").symlink_to(outside)
    (tmp_path / "root" / "a.png").symlink_to(outside / "secret.png")
    for key in ("inputs/secret.png", "a.png"):
        with pytest.raises(StorageError):
            storage.get(key)
    for key in ("inputs/new.png", "inputs/new/folder/a.png"):
        with pytest.raises(InvalidKey, match="link"):
            storage.put(key, b"x", "image/png")
    with pytest.raises(StorageError):
        storage.delete("inputs/secret.png")
    storage.delete("a.png")
    assert (outside / "secret.png").read_bytes() == b"secret" and len(list(outside.iterdir())) == 1
