"""Storage: pictures in and out, by key, in a directory or in S3; one protocol, the same contract tests."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from jobs.errors import InvalidKey, KeyNotFound, SettingsError, StorageError, StorageRefused
from jobs.failpoints import failpoint

MAX_KEY = 512
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\Z")
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.part\Z")
#: What a folder answers to somebody who may not.
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True, slots=True)
class Stored:
    """An object that is there. modified: when it was put, by the storage's own clock, in UTC."""

    key: str
    size_bytes: int
    modified: datetime


class Storage(Protocol):
    """Objects by key. A put is whole or not at all, and replaces what was there. Safe to share between threads.

    Every method raises InvalidKey for a key that `check_key` refuses, StorageError when the storage does not answer,
    StorageRefused when it answers that we may not.
    """

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store the bytes under the key; returns when they are known to be there as a whole."""

    def get(self, key: str) -> bytes:
        """The bytes of the key. Raises KeyNotFound."""

    def delete(self, key: str) -> None:
        """Remove the object; one that is not there is no error."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of that key."""

    def look(self, key: str) -> Stored:
        """Size and age of one object. Raises KeyNotFound."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """Every object whose key begins with `prefix`, in no order, a bounded page at a time.

        What is put or deleted meanwhile may be among them or not; names that are no keys are left out.
        """

    def tidy(self, before: datetime) -> int:
        """Remove what puts that were cut off before that time left behind; how much that was."""

    def public(self) -> bool | None:
        """Whether people can read the objects who were never let in; None: not known."""

    def url(self, key: str) -> str:
        """Where a person or another program finds the object: file:///... or s3://bucket/..."""


def check_key(key: str) -> str:
    """The key itself, when it is parts of letters, digits, `.`, `_` and `-`, joined by `/`. Raises InvalidKey.

    A part begins with a letter or digit, so neither `..` nor a hidden or temporary file is ever named.
    """
    if len(key) > MAX_KEY or not all(_PART.match(part) for part in key.split("/")):
        raise InvalidKey(
            f"storage key {key[:80]!r} is not allowed; allowed: at most {MAX_KEY} characters, parts of letters, "
            "digits, dots, dashes and underscores, each beginning with a letter or digit, joined by /"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, when keys can begin with it. Raises InvalidKey."""
    return prefix and check_key(prefix.removesuffix("/")) and prefix


def is_key(text: str) -> bool:
    """Whether `check_key` takes it: a storage may hold what others put there."""
    with contextlib.suppress(InvalidKey):
        check_key(text)
        return True
    return False


def open_storage(url: str) -> Storage:
    """The storage of NIGHTSHIFT_STORAGE_URL. Raises SettingsError."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise SettingsError("NIGHTSHIFT_STORAGE_URL names no absolute folder; write file:///dir (three slashes)")
        return DirStorage(Path(unquote(parts.path)))
    if parts.scheme == "s3":
        return _open_s3(parts.netloc, parts.path.strip("/"))
    raise SettingsError("NIGHTSHIFT_STORAGE_URL begins with neither file:// nor s3://")


def _open_s3(bucket: str, prefix: str) -> Storage:
    if not bucket or "@" in bucket:
        raise SettingsError(
            "NIGHTSHIFT_STORAGE_URL names no bucket; write s3://bucket/prefix (credentials go into AWS_... variables)"
        )
    if prefix:
        check_key(prefix)
    try:
        # Loaded here, not above: boto3 is an extra that a directory does not need.
        module = importlib.import_module("jobs.storage_s3")
    except ModuleNotFoundError as error:
        if error.name not in ("boto3", "botocore"):
            raise
        raise SettingsError(
            "NIGHTSHIFT_STORAGE_URL names S3, whose client is not installed: pip install 'nightshift[s3]'"
        ) from None
    storage: Storage = module.S3Storage(bucket, prefix)
    return storage


class DirStorage:
    """Objects as files under `root`. Nothing outside it is ever touched, whatever links somebody puts inside."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"NIGHTSHIFT_STORAGE_URL: cannot make {self._root}: {error.strerror}") from None
        self._real_root = self._root.resolve()

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """As Storage.put. The bytes are on the disk before the name is: a crash leaves no half file in sight."""
        path = self._path(key)
        temporary = path.parent / f".{secrets.token_hex(8)}.part"  # as _UNFINISHED; no key is called like that
        with _told(key):
            self._make_folders(path.parent, key)
            try:
                _write_through(temporary, data)
                failpoint("half_put")
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(path.parent)

    def get(self, key: str) -> bytes:
        """As Storage.get."""
        path = self._path(key)
        with _told(key):
            self._check_inside(path.parent, key)
            try:
                with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise KeyNotFound(f"the storage has no object {key}") from None

    def delete(self, key: str) -> None:
        """As Storage.delete."""
        path = self._path(key)
        with _told(key), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._check_inside(path.parent, key)
            path.unlink()

    def exists(self, key: str) -> bool:
        """As Storage.exists."""
        with contextlib.suppress(KeyNotFound):
            self.look(key)
            return True
        return False

    def look(self, key: str) -> Stored:
        """As Storage.look."""
        path = self._path(key)
        with _told(key):
            self._check_inside(path.parent, key)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                found = path.lstat()
                if stat.S_ISREG(found.st_mode):
                    return _stored(key, found)
        raise KeyNotFound(f"the storage has no object {key}")

    def list(self, prefix: str) -> Iterator[Stored]:
        """As Storage.list. Never follows a link."""
        start = self._root / check_prefix(prefix).rpartition("/")[0]
        with _told(prefix):
            self._check_inside(start, prefix)
            for folder, _, names in os.walk(start, onerror=_unless_gone):
                for name in names:
                    key = Path(folder, name).relative_to(self._root).as_posix()
                    if key.startswith(prefix) and is_key(key):
                        with contextlib.suppress(KeyNotFound):  # a link, or deleted this moment
                            yield self.look(key)

    def tidy(self, before: datetime) -> int:
        """As Storage.tidy; also removes the folders that deleted objects left empty, all but the outermost ones."""
        removed = 0
        with _told("unfinished files"):
            for folder, _, names in os.walk(self._root, topdown=False, onerror=_unless_gone):
                for path in (Path(folder, name) for name in names if _UNFINISHED.match(name)):
                    removed += _removed(path, before, Path.unlink)
                if len(Path(folder).relative_to(self._root).parts) > 1:
                    _removed(Path(folder), before, Path.rmdir)
        return removed

    def public(self) -> bool | None:
        """As Storage.public: whether every user of this machine may."""
        with _told("the folder's permissions"):
            ways = [self._real_root, *self._real_root.parents]
            return all(folder.stat().st_mode & stat.S_IXOTH for folder in ways)

    def url(self, key: str) -> str:
        """The file's own URL."""
        return self._path(key).as_uri()

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _make_folders(self, folder: Path, key: str) -> None:
        """One by one: `parents=True` would leave those between open to others, and make some beyond a planted link."""
        made = self._root
        made.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in folder.relative_to(self._root).parts:
            made /= part
            made.mkdir(mode=0o700, exist_ok=True)
            self._check_inside(made, key)

    def _check_inside(self, folder: Path, key: str) -> None:
        if not folder.resolve().is_relative_to(self._real_root):
            raise InvalidKey(f"storage key {key!r} leads out of {self._root} through a link; remove the link")


@contextlib.contextmanager
def _told(key: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = StorageRefused if error.errno in _NOT_ALLOWED else StorageError
        raise kind(f"the storage cannot reach {key}: {error.strerror}") from error


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):  # a folder that was removed while we walked
        raise error


def _stored(key: str, found: os.stat_result) -> Stored:
    return Stored(key, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC))


def _removed(path: Path, before: datetime, remove: Callable[[Path], None]) -> bool:
    """Whether it was old enough and went; a folder that is not empty stays."""
    try:
        if path.lstat().st_mtime >= before.timestamp():
            return False
        remove(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _write_through(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
