"""The oracle: what must hold after every night, whatever happened in it.

I1 every job has ended; I2 a succeeded job has exactly its pictures, each stored whole, each the one that an
undisturbed engine draws; I3 what had ended did not change; I4 attempts and solo crashes are within their limits, and
nobody paid for another's fault; I6 hardly anything is stored that nobody shows; I7 nothing is held, and the broker is
empty when nobody works; I9 nothing was computed oftener than the fault explains. (I5, stale tokens, is the store's own
property test; I8, leaving in time, is `Worker.stop`.)
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import numpy as np
import numpy.typing as npt
import redis
import sqlalchemy as sa
from PIL import Image

from jobs import JobSpec, JobView, State
from jobs.errors import KeyNotFound
from jobs.models import MAX_SOLO_CRASHES
from jobs.models import job as job_table
from jobs.storage import Storage
from sd_engine import Request
from tests.faults.fake_runner import expected_pictures
from tests.faults.harness import Night
from worker.translate import to_requests

#: In place of a spec that cannot be read.
DUMMY = JobSpec(prompt="unreadable")
#: Seconds that a worker has to hear and drop the last bells: after an outage Celery looks for the broker in ever longer
#: pauses, and what was not acked comes back later still.
IDLE_S = 30.0
#: A key, the picture stored there, and what was asked for.
Drawn = tuple[str, npt.NDArray[np.uint8], Request]


@dataclass(frozen=True, slots=True)
class Expected:
    """How the night should have ended; jobs in none of the sets have succeeded.

    either: they may have succeeded or been cancelled. charged: more than one attempt may have been counted.
    duplicates: pictures computed again. orphans: objects that nobody shows. broker: it must be empty now.
    pictures: they are the fake runner's.
    """

    failed: Collection[UUID] = ()
    cancelled: Collection[UUID] = ()
    either: Collection[UUID] = ()
    charged: Collection[UUID] = ()
    duplicates: int = 0
    orphans: int = 0
    broker: bool = False
    pictures: bool = True

    def allows(self, id: UUID, state: State) -> bool:
        """Whether that job may have ended so."""
        for named, allowed in (
            (self.failed, {State.failed}),
            (self.cancelled, {State.cancelled}),
            (self.either, {State.succeeded, State.cancelled}),
        ):
            if id in named:
                return state in allowed
        return state is State.succeeded


def check(night: Night, **expected: Any) -> str:
    """One line; raises AssertionError, with the night's seed, for whatever does not hold."""
    wanted = Expected(**expected)
    found = {view.id: view for view in night.client.jobs(ids=[job.id for job in night.jobs])}
    again = computed_again(night)
    complaints = [
        *ended(night, found, wanted),
        *unchanged(night, found),
        *charges(found, wanted),
        *held(night),
        *shown(found, night.storage, wanted),
        *stored_beside(night, found, wanted),
        *tally(night, found, wanted, again),
        *(broker_rest(night) if wanted.broker else ()),
    ]
    assert not complaints, f"seed {night.seed}, {night.lane}:\n" + "\n".join(complaints[:40]) + f"\n{night.tail()}"
    counts = Counter(str(view.state) for view in found.values())
    return f"{night.lane} seed {night.seed}: {dict(counts)}, {again} pictures computed again"


def ended(night: Night, found: dict[UUID, JobView], wanted: Expected) -> Iterator[str]:
    """I1: nothing is lost, nothing is left, and each ended as it should."""
    for job in night.jobs:
        view = found.get(job.id)
        if view is None:
            yield f"I1: {job.id} is gone"
        elif not view.ended or not wanted.allows(view.id, view.state):
            yield f"I1: {view.id} is {view.state}: {view.error}"


def unchanged(night: Night, found: dict[UUID, JobView]) -> Iterator[str]:
    """I3: what was seen to have ended is still the same."""
    for id, first in night.ended.items():
        if id in found and _comparable(found[id]) != _comparable(first):
            yield f"I3: {id} changed after its end: {first} -> {found[id]}"


def _comparable(view: JobView) -> JobView:
    """A spec that cannot be read is an error, which equals no other."""
    return replace(view, stored=DUMMY, error=f"{view.error} {view.unreadable}") if view.unreadable else view


def charges(found: dict[UUID, JobView], wanted: Expected) -> Iterator[str]:
    """I4: limits are kept, and a fault of the machine is nobody's attempt."""
    for view in found.values():
        if view.solo_crashes > MAX_SOLO_CRASHES:
            yield f"I4: {view.id} has {view.solo_crashes} solo crashes"
        if view.attempts > 3 or view.attempts < 0:
            yield f"I4: {view.id} has {view.attempts} attempts"
        if view.state is not State.succeeded or view.id in wanted.charged:
            continue
        if view.attempts != 1 or view.solo_crashes:
            yield f"I4: {view.id} paid for a fault: {view.attempts} attempts, {view.solo_crashes} solo crashes"


def held(night: Night) -> Iterator[str]:
    """I7: no lease is left, of these jobs or of any other."""
    left = sa.or_(job_table.c.state == State.running, job_table.c.lease_expires_at.is_not(None))
    with night.store.engines.reader.connect() as connection:
        for row in connection.execute(sa.select(job_table.c.id, job_table.c.state).where(left)):
            yield f"I7: {row.id} is {row.state} and under a lease"


def shown(found: dict[UUID, JobView], storage: Storage, wanted: Expected) -> Iterator[str]:
    """I2: exactly the pictures that were asked for, and each the right one."""
    keys, drawn = Counter(image.key for view in found.values() for image in view.images), list[Drawn]()
    yield from (f"I2: {key} is shown {count} times" for key, count in keys.items() if count > 1)
    for view in found.values():
        if view.unreadable:
            continue
        images = view.spec.images if view.state is State.succeeded else 0
        if [image.index for image in view.images] != list(range(images)):
            yield f"I2: {view.id} is {view.state} and shows {len(view.images)} pictures, not {images}"
        elif images:
            yield from _stored(view, storage, wanted, drawn)
    # By one call: an engine that draws them one after the other takes longer than the whole rest of the check.
    pictures = expected_pictures([request for _, _, request in drawn])
    for (key, stored, _), picture in zip(drawn, pictures, strict=True):
        if not np.array_equal(stored, picture):
            yield f"I2: {key} is another picture"


def _stored(view: JobView, storage: Storage, wanted: Expected, drawn: list[Drawn]) -> Iterator[str]:
    """Appends to `drawn` what is stored as the row says."""
    requests = to_requests(view.spec, storage) if wanted.pictures else [None] * len(view.images)
    for image, request in zip(view.images, requests, strict=True):
        try:
            data = storage.get(image.key)
        except KeyNotFound:
            yield f"I2: {image.key} is shown and not stored"
            continue
        if (hashlib.sha256(data).hexdigest(), len(data)) != (image.sha256, image.size_bytes):
            yield f"I2: {image.key} is not what the row says"
        elif request is not None:
            with Image.open(io.BytesIO(data)) as picture:
                drawn.append((image.key, np.asarray(picture), request))


def stored_beside(night: Night, found: dict[UUID, JobView], wanted: Expected) -> Iterator[str]:
    """I6: few objects that nobody shows, and none of them under a name that is shown."""
    named = {image.key for view in found.values() for image in view.images}
    beside = [key for key in keys_in(night) if key not in named and not key.startswith("inputs/")]
    if len(beside) > wanted.orphans:
        yield f"I6: {len(beside)} objects that nobody shows, allowed {wanted.orphans}: {beside[:5]}"


def keys_in(night: Night) -> list[str]:
    """Every object, and every half file, that is stored there."""
    parts = urlsplit(night.settings.storage_url)
    if parts.scheme == "file":
        root = Path(unquote(parts.path))
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return [found.key for found in night.storage.list("")]


def computed_again(night: Night) -> int:
    """Pictures that were computed although they had been before."""
    drawn = Counter((entry.prompt, entry.seed) for entry in night.entries("drawn"))
    return sum(count - 1 for count in drawn.values())


def tally(night: Night, found: dict[UUID, JobView], wanted: Expected, again: int) -> Iterator[str]:
    """I9: each picture that is shown was computed, and not much more than that was."""
    if not wanted.pictures:
        return
    drawn = {(entry.prompt, entry.seed) for entry in night.entries("drawn")}
    for view in found.values():
        for image in view.images:
            if (view.spec.prompt, image.seed) not in drawn:
                yield f"I9: {image.key} was never computed"
    if again > wanted.duplicates:
        yield f"I9: {again} pictures computed again, allowed {wanted.duplicates}"


def broker_rest(night: Night) -> Iterator[str]:
    """I7: no bell waits and none is unanswered, a moment after the last job."""
    if not night.settings.broker_url.startswith("redis"):
        return
    with redis.Redis.from_url(night.settings.broker_url) as broker:
        deadline = time.monotonic() + IDLE_S
        while (rest := _bells(broker)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield from (f"I7: the broker still has {count} in {name}" for name, count in rest.items())


def _bells(broker: redis.Redis) -> dict[str, int]:
    lists = [key.decode() for key in broker.scan_iter("nightshift:render.*", _type="list")]
    sizes = {key: int(broker.llen(key)) for key in lists}
    sizes["nightshift:unacked"] = int(broker.hlen("nightshift:unacked"))
    return {name: size for name, size in sizes.items() if size}
