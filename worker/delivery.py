"""The second half of a job's story: pictures into the storage, their names into the row, or the reason why not."""

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jobs.errors import InvalidKey, KeyNotFound, StorageError, StorageRefused
from jobs.failpoints import failpoint
from jobs.storage import Storage
from jobs.store import Store
from jobs.views import Claim, Output
from sd_engine import InvalidRequest, WeightsError
from worker.encode import encode
from worker.leases import Lease
from worker.reasons import CancelAsked, Draining, Interrupted, LeaseLost, OutcomeUnknown, StepBroke, Unusable

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture as the engine made it, uint8 ``[H, W, 3]``, and the seed that drew it."""

    seed: int
    image: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Outside:
    """The database and the storage, and how much patience one has with them. Times in seconds.

    ``back_off_s``: between the attempts of one statement; a few seconds in all, well inside a lease. For the storage
    the last of them is repeated until ``patience_s`` is over; then the job waits ``snooze_s`` in the queue.
    ``png_parameters``: whether a picture carries its prompt and its other parameters.
    """

    store: Store
    storage: Storage
    back_off_s: Sequence[float] = (0.2, 0.5, 1.0, 2.0)
    patience_s: float = 600.0
    snooze_s: float = 60.0
    png_parameters: bool = True
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def show(lease: Lease, pictures: Sequence[Drawn], outside: Outside) -> None:
    """Encode and store each picture, then make them visible. Raises the reason when nothing of it may be visible."""
    lease.check()
    failpoint("before_upload")
    outputs = [upload(index, picture, lease, outside) for index, picture in enumerate(pictures)]
    failpoint("after_upload")
    lease.check()
    finish(lease, outputs, outside)
    delete([lease.claim.saved_key] if lease.claim.saved_key else [], lease.claim, outside.storage)


def upload(index: int, picture: Drawn, lease: Lease, outside: Outside) -> Output:
    """Encode one image and store it; the bytes are kept while the storage is away, so nothing is drawn twice."""
    encoded = encode(picture.image, lease.claim.spec, picture.seed, parameters=outside.png_parameters)
    key = key_of(lease.claim, index)
    lease.stored.append(key)  # before the put: an unanswered one may have stored the object all the same
    keep_trying(lambda: outside.storage.put(key, encoded.data, "image/png"), lease, outside)
    return Output(index, key, picture.seed, encoded.width, encoded.height, encoded.sha256, len(encoded.data))


def key_of(claim: Claim, index: int) -> str:
    """Unique per claim: two workers that both believe in their lease never write the same object."""
    return f"images/{claim.job_id}/{claim.token}/{index}.png"


def saved_key_of(claim: Claim) -> str:
    """Where a leaving worker keeps the rows of its claim."""
    return f"saved/{claim.job_id}/{claim.token}.safetensors"


def keep_trying(put: Callable[[], None], lease: Lease, outside: Outside) -> None:
    """``put()`` until the storage takes it, for ``patience_s`` at most; then its last error is raised."""
    deadline = outside.clock() + outside.patience_s
    slowest_s = outside.back_off_s[-1]
    for wait_s in chain(outside.back_off_s, repeat(slowest_s)):
        lease.check()
        try:
            return put()
        except InvalidKey:
            raise
        except StorageError as error:
            refused = isinstance(error, StorageRefused)
            if outside.clock() + wait_s >= deadline:
                raise
            log.log(
                logging.ERROR if refused else logging.WARNING,
                "job %s: its picture waits for the storage: %s%s",
                lease.claim.job_id,
                describe(error),
                "; see to the credentials and the bucket's policy" if refused else "",
            )
        lease.pause(slowest_s if refused else wait_s)


def finish(lease: Lease, outputs: Sequence[Output], outside: Outside) -> None:
    """The guarded UPDATE that makes the pictures visible. Raises the reason when they must not be.

    A commit that raised may have been applied, so it is asked again: the store knows its own token. While the database
    is away that goes on until the lease runs out, for the picture is drawn and stored already.
    """
    claim, began = lease.claim, outside.clock()
    # From the first attempt on they may be visible, whatever is raised from now on: nobody may remove them.
    stored, lease.stored = lease.stored, []
    for tries, wait_s in enumerate(chain(outside.back_off_s, repeat(outside.back_off_s[-1]))):
        # A heartbeat that got through meanwhile tells that the trouble is this statement's own.
        away = lease.trusted_since <= began and outside.clock() < began + outside.patience_s
        last = lease.reason is not None or (tries >= len(outside.back_off_s) and not away)
        try:
            shown = outside.store.finish(claim, outputs)
            break
        except Exception as error:
            if last:
                raise OutcomeUnknown(describe(error)) from error
            log.warning("trying again in %.1f s: %s", wait_s, describe(error))
        with suppress(Interrupted):
            lease.pause(wait_s)
    if not shown:
        lease.stored = stored
        raise lease.reason or CancelAsked("not shown, for it was cancelled or its lease was lost meanwhile")
    log.info("job %s: succeeded, %d images", claim.job_id, len(outputs))


def settle(lease: Lease, error: BaseException, outside: Outside, lose: Callable[[Claim], None]) -> None:
    """Tell the database why there is no picture, and remove what nobody will ever see.

    ``lose`` is told of a claim whose lease ran out, or may: the database must hear that its worker lives.
    """
    claim, store = lease.claim, outside.store
    # Only to be removed once the row has let go of it: whoever holds the job after us goes on from there.
    saved_before = [claim.saved_key] if claim.saved_key else []
    useless = [*lease.stored]
    match error:
        case OutcomeUnknown():
            lose(claim)
            log.error("job %s: the database did not say whether it is finished: %s", claim.job_id, error)
        case LeaseLost():
            lose(claim)
            log.warning("job %s: dropped: %s", claim.job_id, error)
        case CancelAsked():
            if again(lambda: store.confirm_cancelled(claim), outside):
                useless += saved_before
            else:
                lose(claim)
            log.info("job %s: %s", claim.job_id, error)
        case Draining():
            saved_key = save(claim, error.saved, outside)
            released = again(lambda: store.release(claim, saved_key=saved_key), outside)
            useless += saved_before if released and saved_key else []
            log.info("job %s: released: %s", claim.job_id, error)
        case StepBroke():
            reason = describe(error.__cause__ or error)
            again(lambda: store.release(claim, suspect=True, reason=reason), outside)
            log.error("job %s: to be drawn alone, for a step of many broke: %s", claim.job_id, reason)
        case Unusable() | InvalidRequest() | WeightsError() | InvalidKey() | KeyNotFound():
            ended = again(lambda: store.fail(claim, describe(error), retry=False), outside)
            useless += saved_before if ended else []
            log.warning("job %s: failed for good: %s", claim.job_id, describe(error))
        case StorageError():
            again(lambda: store.release(claim, wait_s=outside.snooze_s, reason=describe(error)), outside)
            log.error("job %s: put off for %.0f s: %s", claim.job_id, outside.snooze_s, describe(error))
        case _:
            trace = "".join(traceback.format_exception(error))
            state = again(lambda: store.fail(claim, describe(error), retry=True, traceback=trace), outside)
            useless += saved_before if state else []
            log.error("job %s: attempt %d failed, now %s", claim.job_id, claim.attempt, state, exc_info=error)
    delete(useless, claim, outside.storage)


def save(claim: Claim, saved: bytes | None, outside: Outside) -> str | None:
    """Keep the rows of a job that is given back; None when there is nothing to keep, or no storage to keep it."""
    if saved is None:
        return None
    key = saved_key_of(claim)
    try:
        outside.storage.put(key, saved, "application/octet-stream")
    except StorageError as error:
        log.warning("job %s: its steps are lost: %s", claim.job_id, describe(error))
        return None
    failpoint("after_save")
    return key


def delete(keys: Sequence[str], claim: Claim, storage: Storage) -> None:
    """Remove objects that no row names; what cannot be removed is an invisible orphan, for ``nightshift prune``."""
    for key in keys:
        try:
            storage.delete(key)
        except KeyNotFound:
            continue
        except StorageError as error:
            log.warning("job %s: an invisible object stays behind: %s", claim.job_id, error)


def again(call: Callable[[], T], outside: Outside) -> T:
    """``call()``, and again after each back-off while it raises."""
    for wait_s in outside.back_off_s:
        try:
            return call()
        except Exception as error:
            log.warning("trying again in %.1f s: %s", wait_s, describe(error))
        outside.sleep(wait_s)
    return call()


def describe(error: BaseException) -> str:
    """One line for the row and the log. A prompt never stands in it: our errors quote values, not texts."""
    text = " ".join(str(error).split())
    return text if isinstance(error, Unusable) else f"{type(error).__name__}: {text}".removesuffix(": ")
