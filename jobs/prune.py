"""Housekeeping: old jobs with all that is theirs, and objects that no row names.

Rows go first and objects afterwards: a crash in between leaves objects that nobody sees, never a row whose picture is
gone. What the rows named is written down in the storage before (`prune/...json`), and that note is kept until a later
run finds nothing of it any more; so no orphan is forgotten. An object of a job that neither the database nor a note
knows may be another database's, or a gallery that somebody kept: it stays unless `unknown` is ordered.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar
from uuid import UUID, uuid4

import sqlalchemy as sa

from jobs.errors import KeyNotFound
from jobs.failpoints import failpoint
from jobs.probe import PROBES, storage_now
from jobs.states import TERMINAL, State
from jobs.storage import Storage, Stored
from jobs.store_prune import Filter, Going, Housekeeper, Needed
from jobs.store_read import chunks

T = TypeVar("T")
Watch = Callable[[str, Iterable[int], int | None], None]
NOTES = "prune/"
MAX_BITE = 1000
#: Inputs looked at again right before they are deleted: few, so that the look is young when they are.
INPUT_BITE = 50
#: An input is kept for a day after it was last put, whatever was ordered: its job may be about to be inserted.
INPUT_AGE = timedelta(days=1)
ORPHAN_AGE = timedelta(days=1)
#: A probe is there for seconds; one that is younger may be another run's, which asks for the storage's time just now.
PROBE_AGE = timedelta(hours=1)
_UUID = r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"
_OWNED = re.compile(rf"(?:images/{_UUID}/{_UUID}/|saved/{_UUID}/{_UUID}\.)")


@dataclass(frozen=True, slots=True)
class Order:
    """What is to go: jobs that ended in one of `states` longer ago than `older_than`, of one batch or of all, and
    orphans that were stored longer ago than `orphans_older_than`. unknown: also those of jobs never heard of."""

    older_than: timedelta
    states: frozenset[State] = TERMINAL
    batch: str | None = None
    orphans_older_than: timedelta = ORPHAN_AGE
    unknown: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class Pruned:
    """How much went, or would go. objects: of the jobs. unknown: objects of jobs never heard of, gone or left."""

    jobs: int = 0
    objects: int = 0
    batches: int = 0
    orphans: int = 0
    inputs: int = 0
    unknown: int = 0
    unfinished: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """What an earlier bite was about to remove."""

    stored: Stored
    jobs: frozenset[UUID]
    inputs: frozenset[str]


@dataclass(slots=True)
class Bites:
    """How much one transaction takes: half as much after each that the database refused to wait for, then more again.

    A worker's claim must never wait long for housekeeping.
    """

    size: int = MAX_BITE

    def run(self, work: Callable[[int], T]) -> T:
        """`work(size)`. Raises what the database raises when even one row is too many."""
        while True:
            try:
                done = work(self.size)
            except (sa.exc.OperationalError, sa.exc.IntegrityError):  # busy, timeout, deadlock; a batch in use again
                if self.size == 1:
                    raise
                self.size //= 2
                continue
            self.size = min(MAX_BITE, self.size * 2)
            return done


@dataclass(slots=True)
class Prune:
    """One run, step by step; each step yields how many things it has dealt with. Safe beside workers and other runs.

    Raises StorageError and the database's errors wherever it is; the next run goes on from there.
    """

    keeper: Housekeeper
    storage: Storage
    order: Order
    done: Pruned = field(default_factory=Pruned)
    _bites: Bites = field(default_factory=Bites)
    _notes: list[Note] = field(default_factory=list)
    _inputs: set[str] = field(default_factory=set)
    _going: set[UUID] = field(default_factory=set)
    _young: set[str] = field(default_factory=set)

    def run(self, watch: Watch) -> Pruned:
        """All steps; `watch` gets the name of each, the step to go through, and how many things there are if known."""
        old = Filter(self.keeper.now() - self.order.older_than, self.order.states, self.order.batch)
        now = storage_now(self.storage)
        self._notes = list(self._read_notes())
        # The orphans first: while a job's row is there, whatever is under its name is known to be ours.
        watch("looking for orphans", self._remove_orphans(now), None)
        watch("removing old jobs", self._remove_jobs(old), self.keeper.count(old))
        watch("looking for inputs", self._remove_inputs(now - max(INPUT_AGE, self.order.orphans_older_than)), None)
        if not self.order.dry_run:
            self._remove_notes(now - self.order.orphans_older_than)
            while removed := self._bites.run(partial(self.keeper.remove_batches, old.before)):
                self.done.batches += removed
            self.done.unfinished = self.storage.tidy(now - self.order.orphans_older_than)
        return self.done

    def _remove_orphans(self, now: datetime) -> Iterator[int]:
        known = {job_id for note in self._notes for job_id in note.jobs}
        for some in _batched(self._old_keys(now), MAX_BITE):
            owners = {key: owner for key in some if (owner := owner_of(key))}
            needed = self.keeper.needed({job_id for job_id, _ in owners.values()})
            orphans = [key for key in some if key.startswith(PROBES)]
            unknown = []
            for key, (job_id, token) in owners.items():
                if job_id not in needed and job_id not in known:
                    unknown.append(key)
                elif not _is_needed(key, token, needed.get(job_id)):
                    orphans.append(key)
            self.done.orphans += len(orphans)
            self.done.unknown += len(unknown)
            self._delete([*orphans, *unknown] if self.order.unknown else orphans)
            yield len(some)

    def _old_keys(self, now: datetime) -> Iterator[str]:
        """Of the objects that may be orphans."""
        age = self.order.orphans_older_than
        for found in (found for prefix in ("images/", "saved/") for found in self.storage.list(prefix)):
            if now - found.modified >= (max(age, PROBE_AGE) if found.key.startswith(PROBES) else age):
                yield found.key

    def _remove_jobs(self, old: Filter) -> Iterator[int]:
        after: Going | None = None
        while going := self._bites.run(partial(self.keeper.going, old, after)):
            after = going[-1]
            self._inputs |= {key for job in going for key in job.inputs}
            gone = {job.id for job in going} if self.order.dry_run else self._remove_rows(going, old)
            objects = [key for job in going if job.id in gone for key in job.objects]
            self._going |= gone if self.order.dry_run else set()
            self.done.jobs += len(gone)
            self.done.objects += len(objects)
            self._delete(objects)
            yield len(going)

    def _remove_rows(self, going: Collection[Going], old: Filter) -> set[UUID]:
        self._write_note(going)
        failpoint("after_prune_note")
        left, gone = [job.id for job in going], set[UUID]()
        while left:
            some, removed = self._bites.run(partial(self._remove_first, left, old))
            left, gone = left[some:], gone | removed
        failpoint("after_prune_rows")
        return gone

    def _remove_first(self, ids: list[UUID], old: Filter, size: int) -> tuple[int, set[UUID]]:
        return size, self.keeper.remove(ids[:size], old)

    def _remove_inputs(self, before: datetime) -> Iterator[int]:
        candidates = self._inputs | {key for note in self._notes for key in note.inputs}
        if self.order.unknown:
            candidates |= {found.key for found in self.storage.list("inputs/") if found.modified <= before}
        since, after = self.keeper.now(), None
        while candidates:
            named, after = self._bites.run(partial(self.keeper.inputs_named, after))
            candidates -= {key for job_id, keys in named.items() if job_id not in self._going for key in keys}
            if after is None:
                break
        for some in chunks(sorted(candidates), INPUT_BITE):
            old = self._old_inputs(some, before)
            if not self.order.dry_run:
                # Once more, now that the look is fresh: jobs may have come since their table was read.
                old -= self.keeper.inputs_named_since(since)
            self.done.inputs += len(old)
            self._delete(old)
            yield len(some)

    def _old_inputs(self, keys: Iterable[str], before: datetime) -> set[str]:
        old = set[str]()
        for key in keys:
            with contextlib.suppress(KeyNotFound):
                (old if self.storage.look(key).modified <= before else self._young).add(key)
        return old

    def _delete(self, keys: Collection[str]) -> None:
        if not self.order.dry_run and keys:
            with ThreadPoolExecutor(8) as pool:
                for _ in pool.map(self.storage.delete, keys):
                    pass

    def _write_note(self, going: Iterable[Going]) -> None:
        note = {
            "jobs": [str(job.id) for job in going],
            "inputs": sorted({key for job in going for key in job.inputs}),
        }
        self.storage.put(f"{NOTES}{uuid4()}.json", json.dumps(note).encode(), "application/json")

    def _read_notes(self) -> Iterator[Note]:
        for stored in self.storage.list(NOTES):
            with contextlib.suppress(KeyNotFound, ValueError, KeyError, TypeError):  # gone, or nobody's note
                note = json.loads(self.storage.get(stored.key))
                inputs = frozenset(str(key) for key in note["inputs"] if str(key).startswith("inputs/"))
                yield Note(stored, frozenset(UUID(job_id) for job_id in note["jobs"]), inputs)

    def _remove_notes(self, before: datetime) -> None:
        """Those whose objects were all old enough to be looked at by this run."""
        self._delete(
            [
                note.stored.key
                for note in self._notes
                if note.stored.modified <= before and not note.inputs & self._young
            ]
        )


def owner_of(key: str) -> tuple[UUID, UUID] | None:
    """The job and the claim's token whose object this is; None for a key of any other kind."""
    match = _OWNED.match(key)
    if match is None:
        return None
    job_id, token = (group for group in match.groups() if group)
    return UUID(job_id), UUID(token)


def _is_needed(key: str, token: UUID, needed: Needed | None) -> bool:
    """Whether a row names it, or the claim that put it may still come to name it.

    A token is taken at one claim and never again: one that is not that of a running job now will never be.
    """
    return needed is not None and (key in needed.objects or token == needed.token)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    some: list[T] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some


def silently(_: str, step: Iterable[int], __: int | None) -> None:
    """Go through a step and show nothing."""
    for _done in step:
        pass
