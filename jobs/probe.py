"""A small object that is put and removed again: whether a storage does all that is asked of it, and its clock."""

from __future__ import annotations

from datetime import datetime
from uuid import uuid4

from jobs.errors import StorageError
from jobs.storage import Storage

#: Where probes are; one that a dead process left behind is removed by prune.
PROBES = "images/probe-"
_DATA = b"nightshift"


def storage_now(storage: Storage) -> datetime:
    """The storage's own clock: its objects' ages are told by no other. Raises StorageError."""
    key = f"{PROBES}{uuid4()}"
    storage.put(key, _DATA, "application/octet-stream")
    try:
        # From the listing, like those that it is compared with: a look may tell whole seconds only.
        for found in storage.list(key):
            return found.modified
        raise StorageError(f"the storage does not list {key}, which was just put")
    finally:
        storage.delete(key)


def check_storage(storage: Storage) -> None:
    """Put, read back, list, delete. Raises StorageError in a sentence that says which of them did not work."""
    key = f"{PROBES}{uuid4()}"
    storage.put(key, _DATA, "application/octet-stream")
    try:
        if storage.get(key) != _DATA:
            raise StorageError(f"the storage gave back other bytes for {key} than were put")
        if [found.key for found in storage.list(key)] != [key]:
            raise StorageError(f"the storage does not list {key}, which was just put")
    finally:
        storage.delete(key)
    if storage.exists(key):
        raise StorageError(f"the storage still has {key} after it was deleted")
