"""The story of one job in a worker, from its claim to its end. Plain functions: Celery only calls ``render``."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from jobs.errors import InvalidKey, KeyNotFound, StorageError
from jobs.storage import Storage
from jobs.store import Store
from jobs.views import Claim, Output
from sd_engine import InvalidRequest, WeightsError
from worker.encode import Picture, encode
from worker.engine_thread import EngineThread
from worker.leases import Lease, Leases
from worker.reasons import CancelAsked, Draining, LeaseLost, OutcomeUnknown, Unusable
from worker.slots import Slots
from worker.translate import to_requests

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds between the attempts of one storage or database call; a few seconds in all, well inside a lease.
BACK_OFF_S = (0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Deps:
    """All that a job needs of its process. ``broken``: models that could not be loaded here, with the reason."""

    store: Store
    storage: Storage
    engine: EngineThread
    leases: Leases
    slots: Slots
    worker_id: str
    lease_s: float
    broken: Mapping[str, str]
    back_off_s: Sequence[float] = BACK_OFF_S
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def render(job_id: str, deps: Deps) -> None:
    """Claim, draw, encode, upload, finish. Never raises: a task that raises is acked all the same and tells nobody."""
    with deps.slots.take(job_id):
        try:
            claimed = claim_job(job_id, deps)
            if claimed is None:
                return
            claim, since = claimed
            with deps.leases.hold(claim, since) as lease:
                if not show(lease, deps):
                    delete_own(lease, deps)
        except BaseException as error:  # MemoryError or SystemExit would leak this thread's slot for ever
            log.error("job %s: left to its lease: %s", job_id, describe(error), exc_info=True)


def show(lease: Lease, deps: Deps) -> bool:
    """Draw the job and make it visible; False when nothing of it is, or may be, visible."""
    claim = lease.claim
    try:
        refuse_broken_model(claim, deps)
        requests = to_requests(claim.spec, deps.storage)
        lease.check()
        images = deps.engine.render(claim.token, requests).result()
        lease.check()
        outputs = [
            upload(index, request.seed, image, lease, deps)
            for index, (request, image) in enumerate(zip(requests, images, strict=True))
        ]
        return finish(claim, outputs, deps)
    except BaseException as error:
        return end_without_picture(claim, error, deps)


def claim_job(job_id: str, deps: Deps) -> tuple[Claim, float] | None:
    """The claim and the time before it; None for a drain, a garbage id, an unknown, finished or taken job."""
    if deps.slots.closed:
        return None
    since = deps.clock()
    try:
        claim = deps.store.claim(UUID(job_id), deps.worker_id, lease_s=deps.lease_s)
    except ValueError:
        log.warning("message dropped: %.60r is not a job id", job_id)
        return None
    if claim is None:
        log.info("job %s: not claimed (unknown, ended, or another worker has it)", job_id)
        return None
    log.info("job %s: claimed, attempt %d", claim.job_id, claim.attempt)
    return claim, since


def refuse_broken_model(claim: Claim, deps: Deps) -> None:
    """Raise ``Unusable`` with the loader's own reason for a model that could not be loaded."""
    reason = deps.broken.get(claim.spec.model)
    if reason is not None:
        raise Unusable(f"model: {claim.spec.model!r} cannot be loaded on {deps.worker_id}: {reason}")


def key_of(claim: Claim, index: int) -> str:
    """Unique per claim: two workers that both believe in their lease never write the same object."""
    return f"images/{claim.job_id}/{claim.token}/{index}.png"


def upload(index: int, seed: int, image: NDArray[np.uint8], lease: Lease, deps: Deps) -> Output:
    """Encode one image and store it; transient storage errors are tried again a few times."""
    lease.check()
    picture: Picture = encode(image, lease.claim.spec, seed)
    key = key_of(lease.claim, index)
    lease.stored.append(key)  # before the put: an unanswered one may have stored the object all the same
    again(lambda: deps.storage.put(key, picture.data, "image/png"), StorageError, lease.check, deps)
    return Output(index, key, seed, picture.width, picture.height, picture.sha256, len(picture.data))


def finish(claim: Claim, outputs: Sequence[Output], deps: Deps) -> bool:
    """The guarded UPDATE that makes the pictures visible; False when the lease was lost or the job cancelled.

    A commit that raised may have been applied, so it is asked again: the store knows its own token.
    """
    try:
        shown = again(lambda: deps.store.finish(claim, outputs), Exception, no_check, deps)
    except Exception as error:
        raise OutcomeUnknown(describe(error)) from error
    if shown:
        log.info("job %s: succeeded, %d images", claim.job_id, len(outputs))
        return True
    cancelled = deps.store.confirm_cancelled(claim)
    log.info("job %s: %s before it was shown", claim.job_id, "cancelled" if cancelled else "lease lost")
    return False


def end_without_picture(claim: Claim, error: BaseException, deps: Deps) -> bool:
    """Tell the database why there is no picture; True when objects must stay because they may be visible."""
    match error:
        case OutcomeUnknown():
            log.error("job %s: the database did not say whether it is finished: %s", claim.job_id, error)
            return True
        case LeaseLost():
            log.warning("job %s: dropped: %s", claim.job_id, error)
        case CancelAsked():
            deps.store.confirm_cancelled(claim)
            log.info("job %s: cancelled", claim.job_id)
        case Draining():
            deps.store.release(claim)
            log.info("job %s: released: %s", claim.job_id, error)
        case Unusable() | InvalidRequest() | WeightsError() | InvalidKey():
            deps.store.fail(claim, describe(error), retry=False)
            log.warning("job %s: failed for good: %s", claim.job_id, describe(error))
        case _:
            state = deps.store.fail(claim, describe(error), retry=True)
            log.error("job %s: attempt %d failed, now %s", claim.job_id, claim.attempt, state, exc_info=error)
    return False


def delete_own(lease: Lease, deps: Deps) -> None:
    """Remove what may have been uploaded under this claim; what cannot be removed is only an invisible orphan."""
    for key in lease.stored:
        try:
            deps.storage.delete(key)
        except KeyNotFound:
            continue
        except StorageError as error:
            log.warning("job %s: an invisible object stays behind: %s", lease.claim.job_id, error)


def again(call: Callable[[], T], kind: type[Exception], check: Callable[[], None], deps: Deps) -> T:
    """``call()``, and again after each back-off while it raises ``kind``; ``check`` may end the waiting by raising."""
    for wait_s in deps.back_off_s:
        try:
            return call()
        except InvalidKey:
            raise
        except kind as error:
            log.warning("trying again in %.1f s: %s", wait_s, describe(error))
        deps.sleep(wait_s)
        check()
    return call()


def no_check() -> None:
    """For calls that must be tried to the end."""


def describe(error: BaseException) -> str:
    """One line for the row and the log. A prompt never stands in it: our errors quote values, not texts."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Unusable) else f"{type(error).__name__}: {text}".removesuffix(": ")
