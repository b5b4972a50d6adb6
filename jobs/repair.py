"""Pictures that the database names and the storage does not have: found, and their jobs queued again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from jobs.errors import KeyNotFound, StorageError
from jobs.storage import Storage
from jobs.store_prune import Housekeeper, Shown
from jobs.views import JobView, Output

#: When so many pictures were looked for and not one was there, it is the storage that is wrong and not the pictures.
TOO_MANY = 10
MISSING = "is missing in the storage"
DIFFERS = "is not what the worker stored (its sha256 differs)"


@dataclass(frozen=True, slots=True)
class Damage:
    """A picture that cannot be shown, and why."""

    job_id: UUID
    index: int
    key: str
    reason: str


class AllMissing(StorageError):
    """Not one of many pictures is there."""


def why_broken(storage: Storage, image: Output, *, deep: bool = False) -> str | None:
    """Why this picture cannot be shown; None when it can. deep: every byte is read. Raises StorageError."""
    try:
        if deep:
            same = hashlib.sha256(storage.get(image.key)).hexdigest() == image.sha256
            return None if same else DIFFERS
        size = storage.look(image.key).size_bytes
        return None if size == image.size_bytes else f"has {size} bytes instead of {image.size_bytes}"
    except KeyNotFound:
        return MISSING


def check(
    storage: Storage,
    jobs: Iterable[Shown | JobView],
    *,
    deep: bool = False,
    all_missing: bool = False,
    seen: Callable[[int], None] = lambda count: None,
) -> list[Damage]:
    """All damage to the pictures of these jobs; `seen` is told how many jobs were looked at.

    Raises StorageError; AllMissing when there are more than a few pictures and none is there, unless `all_missing`.
    """
    found, pictures, missing = list[Damage](), 0, 0
    with ThreadPoolExecutor(8) as pool:
        for job in jobs:
            reasons = list(pool.map(partial(why_broken, storage, deep=deep), job.images))
            pairs = zip(job.images, reasons, strict=True)
            found += [Damage(job.id, image.index, image.key, reason) for image, reason in pairs if reason]
            pictures += len(job.images)
            missing += sum(reason == MISSING for reason in reasons)
            seen(1)
    if pictures >= TOO_MANY and missing == pictures and not all_missing:
        raise AllMissing(
            f"not one of {pictures} pictures is in the storage: is NIGHTSHIFT_STORAGE_URL the one they were stored in? "
            "Nothing was queued; if they are really lost, order it with --all-missing"
        )
    return found


def all_shown(keeper: Housekeeper, batch: str | None, page: int = 500) -> Iterator[Shown]:
    """Every job that succeeded, of a batch or of all, a page at a time."""
    after: Shown | None = None
    while jobs := keeper.shown(batch, after, page):
        yield from jobs
        after = jobs[-1]


def queue_again(keeper: Housekeeper, damage: Iterable[Damage]) -> list[UUID]:
    """Queue the jobs of the damaged pictures again, each once; those that are queued now."""
    queued = dict[UUID, bool]()
    for each in damage:
        if not queued.get(each.job_id):
            reason = f"image {each.index} {each.reason}; queued again by repair"
            queued[each.job_id] = keeper.queue_again(each.job_id, each.key, reason)
    return [job_id for job_id, done in queued.items() if done]
