"""One contract for every storage: a directory, and S3 on two servers that nobody of us wrote."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import InvalidKey, KeyNotFound, SettingsError, StorageError, StorageRefused
from jobs.storage import DirStorage, Storage, check_key, open_storage
from tests.conftest import Bucket
from tests.servers import S3Server, free_port

KEY = "images/0190/token/0.png"


@pytest.fixture
def dir_storage(tmp_path: Path) -> Storage:
    return open_storage((tmp_path / "a folder").as_uri())


@pytest.fixture
def rclone_storage(s3: Bucket) -> Storage:
    return open_storage(s3.url)


@pytest.fixture
def moto_storage(moto_bucket: Bucket) -> Storage:
    return open_storage(moto_bucket.url)


@pytest.fixture(params=["dir", "rclone", "moto"])
def storage(request: pytest.FixtureRequest) -> Storage:
    made: Storage = request.getfixturevalue(f"{request.param}_storage")
    return made


class TestContract:
    def test_what_was_put_is_got(self, storage: Storage) -> None:
        data = bytes(range(256)) * 800
        storage.put(KEY, data, "image/png")
        assert storage.get(KEY) == data
        assert storage.exists(KEY)

    def test_an_empty_object_is_an_object(self, storage: Storage) -> None:
        storage.put(KEY, b"", "image/png")
        assert storage.get(KEY) == b""
        assert storage.exists(KEY)

    def test_a_second_put_replaces(self, storage: Storage) -> None:
        storage.put(KEY, b"a longer first version", "image/png")
        storage.put(KEY, b"second", "image/png")
        assert storage.get(KEY) == b"second"

    def test_what_is_not_there_is_told(self, storage: Storage) -> None:
        assert not storage.exists(KEY)
        with pytest.raises(KeyNotFound, match=KEY):
            storage.get(KEY)

    def test_delete_removes_and_may_be_repeated(self, storage: Storage) -> None:
        storage.put(KEY, b"x", "image/png")
        storage.delete(KEY)
        storage.delete(KEY)
        assert not storage.exists(KEY)

    def test_a_folder_of_keys_is_no_object(self, storage: Storage) -> None:
        storage.put(KEY, b"x", "image/png")
        assert not storage.exists("images/0190")
        with pytest.raises(KeyNotFound):
            storage.get("images/0190")

    @pytest.mark.parametrize(
        "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/.b", "a b", "ä", "a\n", "a\\b", "a" * 600]
    )
    def test_a_key_outside_the_rules_is_refused_everywhere(self, storage: Storage, key: str) -> None:
        for call in (storage.get, storage.delete, storage.exists, storage.url):
            with pytest.raises(InvalidKey, match="allowed"):
                call(key)
        with pytest.raises(InvalidKey):
            storage.put(key, b"x", "image/png")

    def test_the_url_ends_in_the_key(self, storage: Storage) -> None:
        assert storage.url(KEY).endswith(KEY)

    def test_look_tells_size_and_age(self, storage: Storage) -> None:
        storage.put(KEY, b"twelve bytes", "image/png")
        found = storage.look(KEY)
        assert (found.key, found.size_bytes) == (KEY, 12)
        assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=1)
        with pytest.raises(KeyNotFound):
            storage.look("images/another.png")

    @pytest.mark.parametrize(
        ("prefix", "expected"),
        [
            ("", {"images/a/0.png", "images/ab/1.png", "inputs/c.png"}),
            ("images/", {"images/a/0.png", "images/ab/1.png"}),
            ("images/a", {"images/a/0.png", "images/ab/1.png"}),
            ("images/a/", {"images/a/0.png"}),
            ("images/a/0.png", {"images/a/0.png"}),
            ("images/a/0.png/", set()),
            ("saved/", set()),
        ],
    )
    def test_list_finds_what_begins_with_a_prefix(self, storage: Storage, prefix: str, expected: set[str]) -> None:
        for key in ("images/a/0.png", "images/ab/1.png", "inputs/c.png"):
            storage.put(key, key.encode(), "image/png")
        found = list(storage.list(prefix))
        assert {each.key for each in found} == expected
        assert len(found) == len(expected)
        for each in found:  # a listing may tell the time more finely than a look
            assert each.size_bytes == len(each.key)
            assert abs(each.modified - storage.look(each.key).modified) <= timedelta(seconds=1)

    def test_list_goes_on_after_its_first_page(self, storage: Storage) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: storage.put(f"images/{n // 100}/{n}.png", b"x", "image/png"), range(1010)))
        assert len({each.key for each in storage.list("images/")}) == 1010

    def test_list_refuses_what_no_key_begins_with(self, storage: Storage) -> None:
        for prefix in ("../", "/", ".hidden", "a//"):
            with pytest.raises(InvalidKey):
                list(storage.list(prefix))

    def test_many_threads_put_and_get(self, storage: Storage) -> None:
        def put_and_get(number: int) -> bool:
            storage.put(f"images/{number}/0.png", str(number).encode(), "image/png")
            return storage.get(f"images/{number}/0.png") == str(number).encode()

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(put_and_get, range(40)))


@given(st.text(max_size=60) | st.from_regex(r"[a-z./]{1,30}", fullmatch=True))
def test_no_key_leads_out_of_the_root(key: str) -> None:
    root = Path("/srv/storage")
    try:
        path = Path(os.path.normpath(root / check_key(key)))
    except InvalidKey:
        return
    assert path.is_relative_to(root)
    assert path != root
    assert not path.name.startswith(".")


def test_a_planted_link_leads_nowhere(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    root = tmp_path / "root"
    storage = DirStorage(root)
    (root / "images").symlink_to(outside)
    (root / "one.png").symlink_to(outside / "secret.png")
    for call in (storage.get, storage.exists, storage.delete):
        with pytest.raises(InvalidKey, match="link"):
            call("images/secret.png")
    with pytest.raises(InvalidKey, match="link"):
        storage.put("images/new.png", b"x", "image/png")
    with pytest.raises(StorageError):
        storage.get("one.png")
    assert not storage.exists("one.png")
    storage.put("one.png", b"mine", "image/png")
    assert (outside / "secret.png").read_bytes() == b"secret"
    assert list(outside.iterdir()) == [outside / "secret.png"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage = DirStorage(tmp_path / "root")
    versions = [bytes([letter]) * 200_000 for letter in b"ab"]
    storage.put(KEY, versions[0], "image/png")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for data in versions:
                storage.put(KEY, data, "image/png")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(storage.get(KEY) in versions for _ in range(200))
    finally:
        stop.set()
        writer.join()
    assert [path.name for path in (tmp_path / "root/images/0190/token").iterdir()] == ["0.png"]


def test_a_failed_put_leaves_nothing_behind(tmp_path: Path) -> None:
    storage = DirStorage(tmp_path / "root")
    storage.put("images/0.png/inside.png", b"x", "image/png")
    with pytest.raises(StorageError):  # a folder has the name already
        storage.put("images/0.png", b"y", "image/png")
    assert sorted(path.name for path in (tmp_path / "root/images").iterdir()) == ["0.png"]


@pytest.mark.parametrize(
    "url", ["file://host/dir", "file://", "s3://", "s3:///prefix", "s3://key:secret@bucket/x", "http://x"]
)
def test_a_bad_url_is_told_without_its_secret(url: str) -> None:
    with pytest.raises(SettingsError, match="NIGHTSHIFT_STORAGE_URL") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match="cannot make"):
        open_storage(f"file://{tmp_path}/file/storage")


def test_a_bucket_that_is_not_there_is_told(s3: Bucket) -> None:
    storage = open_storage("s3://there-is-no-such-bucket/x")
    with pytest.raises(StorageError, match="there-is-no-such-bucket"):
        storage.put(KEY, b"x", "image/png")


def test_wrong_credentials_are_told_without_the_secret(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StorageRefused, match="refused") as caught:
        open_storage(s3.url).put(KEY, b"x", "image/png")
    assert "wrong-secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_told(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StorageError, match="cannot be reached"):
        open_storage(s3.url).get(KEY)


def test_a_folder_that_cannot_be_written_is_told_as_such(tmp_path: Path) -> None:
    storage = DirStorage(tmp_path / "s")
    (tmp_path / "s" / "images").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot reach images/a/0\.png") as caught:
        storage.put("images/a/0.png", b"x", "image/png")
    assert not isinstance(caught.value, KeyNotFound)
    assert not storage.exists("images/a/0.png")
    storage.delete("images/a/0.png")


def test_missing_credentials_are_told_as_such(s3: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SettingsError, match="AWS_SECRET_ACCESS_KEY"):
        open_storage(s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(StorageRefused, match="credentials"):
        open_storage(s3.url).put(KEY, b"x", "image/png")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_without_permission_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    storage = DirStorage(tmp_path / "s")

    def refuse(*_: object, **__: object) -> int:  # root, as which tests may run, is refused nothing
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageRefused, match=os.strerror(number)):
        storage.put(KEY, b"x", "image/png")


def test_list_shows_neither_unfinished_files_nor_links_nor_what_is_no_key(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = DirStorage(root)
    storage.put(KEY, b"x", "image/png")
    (root / "images" / f".{'0' * 16}.part").write_bytes(b"half")
    (root / "images" / "a name.png").write_bytes(b"not ours")
    (root / "images" / "link.png").symlink_to(root / KEY)
    assert [each.key for each in storage.list("")] == [KEY]


def test_tidy_removes_old_halves_and_empty_folders_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = DirStorage(root)
    storage.put("images/a/t/0.png", b"x", "image/png")
    storage.put("images/b/t/0.png", b"x", "image/png")
    storage.delete("images/b/t/0.png")
    half, foreign = root / "images/a" / f".{'0' * 16}.part", root / "images/a/.hidden"
    for path in (half, foreign):
        path.write_bytes(b"half")
    assert storage.tidy(datetime.now(UTC) - timedelta(hours=1)) == 0
    assert half.exists() and (root / "images/b/t").exists()
    assert storage.tidy(datetime.now(UTC) + timedelta(hours=1)) == 1
    assert foreign.exists() and not half.exists() and not (root / "images/b").exists()
    assert [each.key for each in storage.list("")] == ["images/a/t/0.png"]


class _Liar(BaseHTTPRequestHandler):
    """A bucket that says 200 to every put and keeps only `kept` bytes of it; its ETag is true, or of no meaning."""

    protocol_version = "HTTP/1.1"
    kept, honest_etag, objects, looks = 0, True, dict[str, bytes](), 0

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.objects[self.path] = data[: self.kept]
        self._answer(self.path)

    def do_HEAD(self) -> None:
        _Liar.looks += 1
        self._answer(self.path, len(self.objects[self.path]))

    def _answer(self, path: str, length: int = 0) -> None:
        md5 = hashlib.md5(self.objects[path], usedforsecurity=False).hexdigest()
        self.send_response(200)
        self.send_header("ETag", f'"{md5}"' if self.honest_etag else '"no-md5-2"')
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", "Sat, 21 Nov 2026 00:00:00 GMT")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def lying_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bool], Storage]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Liar) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        for name, value in S3Server(f"http://127.0.0.1:{server.server_port}").environment.items():
            monkeypatch.setenv(name, value)

        def bucket(kept: int, honest_etag: bool) -> Storage:
            monkeypatch.setattr(_Liar, "kept", kept)
            monkeypatch.setattr(_Liar, "honest_etag", honest_etag)
            monkeypatch.setattr(_Liar, "looks", 0)
            return open_storage("s3://bucket/x")

        yield bucket
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("honest_etag", [True, False])
def test_a_put_that_was_stored_short_is_no_success(
    lying_bucket: Callable[[int, bool], Storage], honest_etag: bool
) -> None:
    with pytest.raises(StorageError, match="5 instead of 9"):
        lying_bucket(5, honest_etag).put(KEY, b"nine byte", "image/png")
    lying_bucket(9, honest_etag).put(KEY, b"nine byte", "image/png")


@pytest.mark.parametrize(("honest_etag", "looks"), [(True, 0), (False, 1)])
def test_what_was_put_is_looked_at_only_if_the_answer_does_not_prove_it(
    lying_bucket: Callable[[int, bool], Storage], honest_etag: bool, looks: int
) -> None:
    lying_bucket(9, honest_etag).put(KEY, b"nine byte", "image/png")
    assert _Liar.looks == looks


def test_a_full_disk_leaves_no_half_file_and_is_told_with_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    storage = DirStorage(root)
    storage.put(KEY, b"whole", "image/png")
    code = (
        "import resource, sys; from pathlib import Path; from jobs.storage import DirStorage\n"
        "storage = DirStorage(Path(sys.argv[1]))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a file of more bytes cannot be written\n"
        "for key in (sys.argv[2], 'images/new/0.png'):\n"
        "    try:\n"
        "        storage.put(key, bytes(5000), 'image/png')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, str(root), KEY], capture_output=True, text=True, timeout=60)
    assert told.stdout.splitlines() == [
        f"StorageError the storage cannot reach {key}: {os.strerror(errno.EFBIG)}" for key in (KEY, "images/new/0.png")
    ], told.stderr
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["0.png"]
    assert storage.get(KEY) == b"whole"
