"""A small object that is put and removed again: whether a storage does all that is asked of it, and its clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from uuid import uuid4

from jobs.errors import StorageError
from jobs.storage import Storage, Stored

#: Where probes are; one that a dead process left behind is removed by prune.
PROBES = "images/probe-"
_DATA = b"nightshift"


@contextmanager
def probe(storage: Storage) -> Iterator[str]:
    """The key of a probe, put there, and removed at the end of the block. Raises StorageError."""
    key = f"{PROBES}{uuid4()}"
    try:
        storage.put(key, _DATA, "application/octet-stream")
        yield key
    except BaseException:
        # Also after a put that failed: it may be there all the same.
        with suppress(StorageError):
            storage.delete(key)
        raise
    storage.delete(key)


def storage_now(storage: Storage) -> datetime:
    """The storage's own clock: its objects' ages are told by no other. Raises StorageError."""
    with probe(storage) as key:
        # From the listing, like those that it is compared with: a look may tell whole seconds only.
        return _listed(storage, key).modified


def check_storage(storage: Storage) -> None:
    """Put, read back, list, delete. Raises StorageError in a sentence that says which of them did not work."""
    with probe(storage) as key:
        if storage.get(key) != _DATA:
            raise StorageError(f"the storage gave back other bytes for {key} than were put")
        _listed(storage, key)
    if storage.exists(key):
        raise StorageError(f"the storage still has {key} after it was deleted")


def _listed(storage: Storage, key: str) -> Stored:
    for found in storage.list(key):
        if found.key == key:
            return found
    raise StorageError(f"the storage does not list {key}, which was just put")
