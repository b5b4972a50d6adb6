"""A worker needs to put, get and delete objects below its prefix, and nothing else of a bucket."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from jobs import Client, Settings, State
from jobs.errors import StorageRefused
from jobs.storage import open_storage
from tests.integration.processes import PATIENCE_S, fake_worker, stop, tail, wait_until

PREFIX = "/bucket/nightshift/"


class Guarded(ThreadingHTTPServer):
    """An S3 server that allows GetObject, PutObject and DeleteObject below one prefix, as a policy would.

    As AWS does for those who may not list, it answers 403, not 404, for an object that is not there.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.refused: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Guarded

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._allowed():
            self.server.objects[self.path] = data
            self._answer(200)

    def do_GET(self) -> None:
        if self._allowed():
            data = self.server.objects.get(self.path)
            self._refuse() if data is None else self._answer(200, data)

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        if self._allowed():
            self.server.objects.pop(self.path, None)
            self._answer(204)

    def _allowed(self) -> bool:
        allowed = self.path.startswith(PREFIX) and len(self.path) > len(PREFIX) and "?" not in self.path
        if not allowed:
            self.server.refused.append(f"{self.command} {self.path}")
            self._refuse()
        return allowed

    def _refuse(self) -> None:
        self._answer(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")

    def _answer(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    with Guarded() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "worker")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "worker-secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield server
        server.shutdown()
        thread.join()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_night_needs_no_more_than_to_put_get_and_delete(bucket: Guarded, tmp_path: Path) -> None:
    settings, log = Settings(home=tmp_path / "home", storage_url="s3://bucket/nightshift"), tmp_path / "worker.log"
    with Client(settings) as client, fake_worker(settings, log, step_s=0.01, concurrency=4, lease_s=3.0) as worker:
        jobs = client.submit_many(
            [{"prompt": "a red star", "steps": 2}, {"prompt": "from a picture", "steps": 2, "init_image": picture()}]
        )
        done = client.wait(jobs, PATIENCE_S)
        assert {view.state for view in done} == {State.succeeded}, tail(log)
        assert all(client.image_bytes(view.id).startswith(b"\x89PNG") for view in done)
        assert client.submit("again", init_image=picture(), steps=2).spec.input_key == jobs[1].spec.input_key
        gone = client.submit("cancelled", steps=1000)
        wait_until(lambda: client.get(gone.id).state is State.running, "a running job", log)
        client.cancel(gone.id)
        assert client.wait(gone, PATIENCE_S).state is State.cancelled
        stop(worker, log)
    assert bucket.refused == []
    keys = sorted(path.removeprefix(PREFIX).split("/")[0] for path in bucket.objects)
    assert set(keys) == {"images", "inputs"} and keys.count("inputs") == 1


def test_what_needs_to_list_says_so(bucket: Guarded) -> None:
    storage = open_storage("s3://bucket/nightshift")
    with pytest.raises(StorageRefused, match="AccessDenied"):
        list(storage.list("images"))
    assert len(bucket.refused) == 1


def test_outside_the_prefix_nothing_is_asked(bucket: Guarded) -> None:
    storage = open_storage("s3://bucket/other")
    with pytest.raises(StorageRefused):
        storage.put("images/a.png", b"x", "image/png")
    assert bucket.objects == {}
