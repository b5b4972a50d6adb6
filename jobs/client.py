"""The producer's door: submit, look, wait, cancel, fetch."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, overload
from uuid import UUID

from jobs import schema
from jobs.bell import Bell
from jobs.errors import FieldError, InvalidSpec, JobNotFound, KeyNotFound, StorageError, WaitTimeout
from jobs.failpoints import failpoint
from jobs.inputs import Inputs
from jobs.prune import Order, Prune, Pruned, Watch, silently
from jobs.repair import DIFFERS, MISSING, Damage, all_shown, check, queue_again
from jobs.settings import Settings
from jobs.spec import JobSpec, read_spec
from jobs.states import TERMINAL, State
from jobs.storage import Storage, open_storage
from jobs.store import Store
from jobs.store_prune import Housekeeper
from jobs.views import Due, JobView, Output

#: What may be submitted: a spec, its fields, or a prompt alone.
Submittable = JobSpec | Mapping[str, Any] | str
#: Seconds between two looks of `wait`: soon at first, then rarely enough not to load the database.
FIRST_LOOK_S, RARE_LOOK_S = 0.05, 1.0


class Client:
    """Submits jobs and follows them. Safe to share between threads; close it, or use it in a `with`."""

    def __init__(self, settings: Settings | None = None) -> None:
        """Settings default to the environment. A SQLite database is made and migrated when it needs it.

        Raises SettingsError, DatabaseUnavailable, SchemaOutdated.
        """
        self.settings = settings or Settings()
        self.settings.make_home()
        self._store = Store.open(self.settings.database_url)
        schema.ensure(self._store.engines)

    @cached_property
    def _storage(self) -> Storage:
        return open_storage(self.settings.storage_url)

    @cached_property
    def _bell(self) -> Bell:
        return Bell(self.settings.broker_url)

    def submit(
        self, spec: Submittable | None = None, /, *, idempotency_key: str | None = None, **fields: Any
    ) -> JobView:
        """Submit one job: a spec, or its fields (`submit("a red star", steps=12)`).

        With an idempotency key that was used before, the first job comes back and nothing new is made.
        Raises InvalidSpec, StorageError.
        """
        chosen = _as_spec(spec, fields)
        return self.submit_many([chosen], idempotency_keys=[idempotency_key])[0]

    def submit_many(
        self,
        specs: Iterable[Submittable],
        *,
        batch: str | None = None,
        idempotency_keys: Sequence[str | None] | None = None,
    ) -> list[JobView]:
        """Submit many jobs in one transaction, all or none; their views in the order given.

        `batch` names a set to which they are added. Raises InvalidSpec, StorageError.
        """
        if isinstance(specs, str | Mapping | JobSpec):  # each is iterable: its letters or fields would be the jobs
            raise InvalidSpec(
                FieldError("specs", f"is one {type(specs).__name__}; give a list of specs, or use submit")
            )
        inputs = self.inputs()
        ready = [inputs.stored(_as_spec(spec, {})) for spec in specs]
        views = self._store.submit(ready, batch=batch, idempotency_keys=idempotency_keys, rung=self._bell.rings)
        failpoint("after_insert_commit")
        self._ring(view for view in views if view.state == State.queued)
        return views

    def store_input(self, spec: JobSpec) -> JobSpec:
        """The spec with its init image and mask checked and stored; submitting it later reads no file.

        Raises InvalidSpec, StorageError.
        """
        return self.inputs().stored(spec)

    def inputs(self) -> Inputs:
        """Stores the pictures of many specs, each once; opens the storage when there is one."""
        return Inputs(lambda: self._storage)

    def _ring(self, views: Iterable[JobView]) -> None:
        self._bell.ring(Due(view.id, view.spec.model, view.spec.priority) for view in views if not view.unreadable)

    def get(self, job_id: UUID | str | JobView) -> JobView:
        """The job as it is now. Raises JobNotFound."""
        return self._store.get(as_id(job_id))

    def jobs(
        self,
        *,
        ids: Collection[UUID] | None = None,
        batch: str | None = None,
        state: State | None = None,
        limit: int | None = None,
    ) -> list[JobView]:
        """The jobs that match, the newest first."""
        return self._store.jobs(ids=ids, batch=batch, state=state, limit=limit)

    def counts(self, batch: str | None = None) -> dict[State, int]:
        """How many jobs are in each state, of a batch or of all."""
        return self._store.counts(batch)

    def batch(self, name: str) -> Batch:
        """The batch of that name; one that nobody submitted yet is empty."""
        return Batch(self, name)

    @overload  # a str is an Iterable of str too, to the type checker; the first overload wins
    def wait(self, jobs: UUID | str | JobView, timeout: float | None = None) -> JobView: ...  # type: ignore[overload-overlap]
    @overload
    def wait(self, jobs: Iterable[UUID | str | JobView], timeout: float | None = None) -> list[JobView]: ...
    def wait(
        self, jobs: UUID | str | JobView | Iterable[UUID | str | JobView], timeout: float | None = None
    ) -> JobView | list[JobView]:
        """The job or jobs once they have ended, however they ended; `timeout` in seconds, none: as long as it takes.

        Raises WaitTimeout, JobNotFound.
        """
        if isinstance(jobs, (UUID, str, JobView)):
            return self.wait([jobs], timeout)[0]
        ids = [as_id(job) for job in jobs]
        self._wait_for(ids, timeout)
        views = {view.id: view for some in _slices(ids) for view in self.jobs(ids=some)}
        return [views[job_id] for job_id in ids]

    def _wait_for(self, ids: Sequence[UUID], timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        pause, look_s, open_ids = threading.Event(), FIRST_LOOK_S, set(ids)
        while True:
            states = self._store.states(open_ids)
            if missing := open_ids - states.keys():
                raise JobNotFound(f"there is no job {min(missing)}")
            open_ids = {job_id for job_id, state in states.items() if state not in TERMINAL}
            if not open_ids:
                return
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"{len(open_ids)} of {len(set(ids))} jobs did not end within {timeout} s")
            left_s = RARE_LOOK_S if deadline is None else max(0.0, deadline - time.monotonic())
            pause.wait(min(look_s, left_s))
            look_s = min(RARE_LOOK_S, look_s * 1.5)

    def cancel(self, job_id: UUID | str | JobView) -> State:
        """Cancel a queued job, or ask the worker of a running one to stop; the state it is in now.

        Raises JobNotFound, or JobConflict when the job has ended.
        """
        return self._store.cancel(as_id(job_id))

    def retry(self, job_id: UUID | str | JobView) -> None:
        """Put a failed job back into the queue. Raises JobNotFound, or JobConflict for any other state."""
        self._store.retry(as_id(job_id))
        self._ring([self.get(job_id)])

    def image_bytes(self, job_id: UUID | str | JobView, index: int = 0) -> bytes:
        """The PNG of one image. Raises JobNotFound when there is none (yet), StorageError; KeyNotFound when the
        database names it and the storage has lost it."""
        found = self._image(job_id, index)
        try:
            data = self._storage.get(found.key)
        except KeyNotFound:
            raise KeyNotFound(_lost(job_id, index, MISSING)) from None
        if hashlib.sha256(data).hexdigest() != found.sha256:
            raise StorageError(_lost(job_id, index, DIFFERS, "--deep "))
        return data

    def image_url(self, job_id: UUID | str | JobView, index: int = 0) -> str:
        """Where the image is: file:///... or s3://... Raises JobNotFound when there is none (yet), StorageError;
        KeyNotFound when the database names it and the storage has lost it: no link is given that leads nowhere."""
        found = self._image(job_id, index)
        if not self._storage.exists(found.key):
            raise KeyNotFound(_lost(job_id, index, MISSING))
        return self._storage.url(found.key)

    def _image(self, job_id: UUID | str | JobView, index: int) -> Output:
        for image in self.get(job_id).images:
            if image.index == index:
                return image
        raise JobNotFound(f"job {as_id(job_id)} has no image {index}")

    def prune(self, order: Order, watch: Watch = silently) -> Pruned:
        """Remove old jobs with all that is theirs, and objects that no row names. Raises StorageError.

        `watch` goes through each step, so that progress can be shown.
        """
        return Prune(Housekeeper(self._store.engines), self._storage, order).run(watch)

    def count_succeeded(self, batch: str | None = None) -> int:
        """How many jobs show pictures."""
        return self.counts(batch)[State.succeeded]

    def check_images(
        self,
        *,
        batch: str | None = None,
        job_ids: Collection[UUID | str | JobView] = (),
        deep: bool = False,
        all_missing: bool = False,
        seen: Callable[[int], None] = lambda count: None,
    ) -> list[Damage]:
        """Pictures that the database names and the storage has lost: of these jobs, of a batch, or of all.

        deep: every byte is read. Raises JobNotFound, StorageError, and AllMissing rather than call every picture lost.
        """
        jobs = [self.get(job_id) for job_id in job_ids] or all_shown(Housekeeper(self._store.engines), batch)
        return check(self._storage, jobs, deep=deep, all_missing=all_missing, seen=seen)

    def repair(self, damage: Iterable[Damage]) -> list[UUID]:
        """Queue the jobs of damaged pictures again; which ones that are."""
        queued = queue_again(Housekeeper(self._store.engines), damage)
        self._ring(view for some in _slices(queued) for view in self.jobs(ids=some))
        return queued

    def close(self) -> None:
        """Close the connections to database and broker."""
        self._store.close()
        if "_bell" in self.__dict__:
            self._bell.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batch:
    """A named set of jobs."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self.name = name

    def counts(self) -> dict[State, int]:
        """How many of its jobs are in each state."""
        return self._client.counts(self.name)

    def jobs(self, *, state: State | None = None) -> list[JobView]:
        """Its jobs, in the order in which they were submitted."""
        return self._client.jobs(batch=self.name, state=state)[::-1]

    def wait(self, timeout: float | None = None) -> list[JobView]:
        """Its jobs once all have ended. Raises WaitTimeout."""
        return self._client.wait([view.id for view in self.jobs()], timeout)


def as_id(job: UUID | str | JobView) -> UUID:
    """The id of this job. Raises JobNotFound: what is no id names no job."""
    if isinstance(job, JobView):
        return job.id
    try:
        return job if isinstance(job, UUID) else UUID(str(job))
    except ValueError:
        raise JobNotFound(f"{str(job)[:60]!r} is no job id; an id looks like {UUID(int=7 << 76 | 1 << 63)}") from None


def _lost(job_id: UUID | str | JobView, index: int, reason: str, deep: str = "") -> str:
    job = as_id(job_id)
    return f"image {index} of job {job} {reason}; draw it again: nightshift repair {deep}--job {job}"


def _as_spec(spec: Submittable | None, fields: Mapping[str, Any]) -> JobSpec:
    if isinstance(spec, JobSpec):
        return read_spec({**spec.model_dump(), **fields}) if fields else spec
    if isinstance(spec, str):
        return read_spec({"prompt": spec, **fields})
    if spec is not None and not isinstance(spec, Mapping):
        raise InvalidSpec(FieldError("spec", f"is {type(spec).__name__}; give a JobSpec, its fields, or a prompt"))
    return read_spec({**(spec or {}), **fields})


def _slices(ids: Sequence[UUID], size: int = 500) -> Iterable[Sequence[UUID]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
