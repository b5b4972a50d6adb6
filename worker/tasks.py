"""The story of one job in a worker, from its claim to its pictures. Plain functions: Celery only calls ``render``."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID, uuid4

import numpy as np
from numpy.typing import NDArray

from jobs.errors import StorageError
from jobs.failpoints import failpoint
from jobs.storage import Storage
from jobs.store import Store
from jobs.views import Claim, Unanswered
from worker.delivery import Drawn, Outside, describe, settle, show
from worker.engine_thread import EngineThread
from worker.leases import Lease, Leases
from worker.reasons import Unusable
from worker.slots import Slots
from worker.solitude import Solitude
from worker.translate import to_requests
from worker.uploads import Uploads

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deps:
    """All that a job needs of its process. ``broken``: models that could not be loaded here, with the reason.
    ``outside``: the database and the storage, with the patience that one has with them."""

    outside: Outside
    engine: EngineThread
    leases: Leases
    slots: Slots
    solitude: Solitude
    uploads: Uploads
    worker_id: str
    lease_s: float
    broken: Mapping[str, str]
    clock: Callable[[], float] = time.monotonic

    @property
    def store(self) -> Store:
        return self.outside.store

    @property
    def storage(self) -> Storage:
        return self.outside.storage


def render(job_id: str, deps: Deps) -> None:
    """Claim, draw, hand on to be stored and shown. Never raises: a task that raises is acked all the same and tells
    nobody."""
    with deps.slots.take(job_id):
        try:
            with claimed(job_id, deps) as lease:
                if lease is not None:
                    draw(lease, deps)
            failpoint("before_ack")
        except BaseException as error:  # MemoryError or SystemExit would leak this thread's slot for ever
            log.error("job %s: left to its lease: %s", job_id, describe(error), exc_info=True)


@contextmanager
def claimed(job_id: str, deps: Deps) -> Iterator[Lease | None]:
    """The job's lease, in company with others; that of a suspect alone. None for a drain, a garbage id, an unknown,
    finished or taken job."""
    try:
        id = UUID(job_id)
    except ValueError:
        log.warning("message dropped: %.60r is not a job id", job_id)
        yield None
        return
    with deps.solitude.company() as entered:
        lease = claim(id, deps, alone=False) if entered else None
        if lease is not None or not entered:
            yield lease
            return
    if not deps.store.is_suspect(id):
        log.info("job %s: not claimed (unknown, ended, or another worker has it)", id)
        yield None
        return
    with deps.solitude.alone() as entered:
        if entered:
            deps.uploads.join()  # those are held as well: a crash would take them along
        yield claim(id, deps, alone=True) if entered and not deps.slots.closed else None


def claim(job_id: UUID, deps: Deps, *, alone: bool) -> Lease | None:
    """The job under a lease that the heartbeat extends from now on."""
    since = deps.clock()  # before the statement: we must stop trusting a lease before the database does
    token = uuid4()
    try:
        claim = deps.store.claim(job_id, deps.worker_id, lease_s=deps.lease_s, alone=alone, token=token)
    except BaseException:
        # It may be ours all the same: it is given back before its lease makes a suspect of it.
        deps.leases.lose(Unanswered(job_id, token))
        raise
    if claim is None:
        return None
    lease = deps.leases.take(claim, since)
    log.info("job %s: claimed, attempt %d%s", job_id, claim.attempt, ", alone" if alone else "")
    return lease


def draw(lease: Lease, deps: Deps) -> None:
    """Let the engine draw; then the uploads own the lease, and the engine's place is free for the next job.

    A suspect stays here, alone, until it is shown: else the next suspect's crash would be held against it too.
    """
    try:
        failpoint("after_claim")
        pictures = drawn(lease, deps)
        if lease.claim.suspect:
            deliver(lease, pictures, deps)
            return
        deps.uploads.put(lambda: deliver(lease, pictures, deps), check=lease.check)
    except BaseException as error:
        give_up(lease, error, deps)


def drawn(lease: Lease, deps: Deps) -> Sequence[Drawn]:
    """The job's pictures, from where a worker that had to leave stopped, or from the start."""
    claim = lease.claim
    refuse_broken_model(claim, deps)
    requests = to_requests(claim.spec, deps.storage)
    saved = saved_rows(claim, deps.storage)
    lease.check()
    drawing = deps.engine.render(claim.token, requests, saved, urgent=claim.spec.urgent)
    images: Sequence[NDArray[np.uint8]] = drawing.result()
    lease.drawn = True
    lease.check()
    return [Drawn(request.seed, image) for request, image in zip(requests, images, strict=True)]


def deliver(lease: Lease, pictures: Sequence[Drawn], deps: Deps) -> None:
    """Encode, store, show: the end of the story, in a thread of the uploads."""
    try:
        show(lease, pictures, deps.outside)
    except BaseException as error:
        give_up(lease, error, deps)
    else:
        deps.leases.drop(lease)


def give_up(lease: Lease, error: BaseException, deps: Deps) -> None:
    """Tell the database why there is no picture; when it does not answer, the heartbeat tells it later."""
    try:
        settle(lease, error, deps.outside, deps.leases.lose)
    except Exception as unsaid:
        deps.leases.lose(lease.claim)
        log.error("job %s: the database does not know its end: %s", lease.claim.job_id, describe(unsaid), exc_info=True)
    finally:
        deps.leases.drop(lease)


def refuse_broken_model(claim: Claim, deps: Deps) -> None:
    """Raise ``Unusable`` with the loader's own reason for a model that could not be loaded."""
    reason = deps.broken.get(claim.spec.model)
    if reason is not None:
        raise Unusable(f"model: {claim.spec.model!r} cannot be loaded on {deps.worker_id}: {reason}")


def saved_rows(claim: Claim, storage: Storage) -> bytes | None:
    """What a worker that had to leave kept of this job; the job is drawn from the start when it cannot be had."""
    if claim.saved_key is None:
        return None
    try:
        return storage.get(claim.saved_key)
    except StorageError as error:
        log.warning("job %s: drawn from the start: %s", claim.job_id, describe(error))
        return None
