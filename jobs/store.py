"""The queue: every statement on the tables, on SQLite and PostgreSQL alike.

The statements that workers change a job with are in `store_lease`, those that add jobs in `store_insert`, those that
read in `store_read`; nobody else writes SQL or imports these three. Each change of state is one guarded UPDATE on
database time; a guard that does not hold changes no row, and that is an outcome which the caller must handle. The
guards come from `states.TRANSITIONS`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from jobs import store_insert, store_lease, store_read
from jobs.db import Engines, db_now, open_engines
from jobs.errors import JobConflict, JobNotFound
from jobs.failpoints import failpoint
from jobs.models import job
from jobs.spec import JobSpec
from jobs.states import State
from jobs.store_lease import GIVEN_BACK, cancel_wanted, held, is_in, may_become
from jobs.views import Beat, Claim, Due, JobView, Output, Sweep, Unanswered

#: Seconds until the next attempt after the first error; doubled for each further one.
BACKOFF_S = 2.0
MAX_BACKOFF_S = 300.0


class Store:
    """The job table. Safe to share between threads."""

    def __init__(self, engines: Engines, *, rng: random.Random | None = None, backoff_s: float = BACKOFF_S) -> None:
        """`backoff_s`: seconds until the second attempt; doubled for each further one."""
        self._engines = engines
        self._backoff_s = backoff_s
        self._rng = rng or random.SystemRandom()

    @classmethod
    def open(cls, database_url: str, *, rng: random.Random | None = None) -> Store:
        """A store on this database; the tables must be there (`schema.ensure`). Raises SettingsError."""
        return cls(open_engines(database_url), rng=rng)

    @property
    def engines(self) -> Engines:
        return self._engines

    def close(self) -> None:
        """Close the pooled connections."""
        self._engines.dispose()

    # The producer's half

    def submit(
        self,
        specs: Iterable[JobSpec],
        *,
        batch: str | None = None,
        idempotency_keys: Sequence[str | None] | None = None,
        rung: bool = False,
    ) -> list[JobView]:
        """Insert one job per spec, in one transaction; a key that is known already gives its first job instead.

        `rung` says that the caller rings the bells itself, so that the sweeper waits before it rings again.
        Raises InvalidSpec for a picture that is not stored, or an unusable key or batch name.
        """
        rows = store_insert.prepare(list(specs), idempotency_keys, self._rng)
        with self._engines.writer.begin() as connection:
            fresh = store_insert.jobs(connection, rows, batch=batch, rung=rung)
            known = store_read.jobs_of_keys(connection, [row.idempotency_key for row in rows if row.idempotency_key])
            failpoint("before_insert_commit")
        return [known[row.idempotency_key] if row.idempotency_key else fresh[row.id] for row in rows]

    def cancel(self, job_id: UUID) -> State:
        """Cancel a queued job at once; ask the worker of a running one. The state that the job is in now.

        Raises JobNotFound, or JobConflict when the job has ended.
        """
        at_once = is_in(State.queued)
        statement = (
            sa.update(job)
            .where(job.c.id == job_id, may_become(State.cancelled))
            .values(
                state=sa.case((at_once, State.cancelled), else_=job.c.state),
                finished_at=sa.case((at_once, db_now()), else_=job.c.finished_at),
                cancel_requested_at=sa.func.coalesce(job.c.cancel_requested_at, db_now()),
                saved_key=sa.case((at_once, None), else_=job.c.saved_key),
            )
            .returning(job.c.state)
        )
        with self._engines.writer.begin() as connection:
            state = connection.scalar(statement)
            if state is None:
                self._refuse(connection, job_id, "cancelled")
            return State(state)

    def retry(self, job_id: UUID) -> None:
        """Put a failed job back, with all its attempts. Raises JobNotFound, or JobConflict for any other state.

        One that crashed its workers stays a suspect: it comes back alone.
        """
        statement = (
            sa.update(job)
            .where(job.c.id == job_id, is_in(State.failed))
            .values(
                state=State.queued,
                attempts=0,
                suspect=job.c.solo_crashes > 0,
                solo_crashes=0,
                available_at=db_now(),
                finished_at=None,
                rung_at=None,
                **GIVEN_BACK,
            )
        )
        with self._engines.writer.begin() as connection:
            if not connection.execute(statement).rowcount:
                self._refuse(connection, job_id, "retried")

    def _refuse(self, connection: Connection, job_id: UUID, verb: str) -> None:
        state = connection.scalar(sa.select(job.c.state).where(job.c.id == job_id))
        if state is None:
            raise JobNotFound(f"there is no job {job_id}")
        raise JobConflict(f"job {job_id} is {state} and cannot be {verb}")

    # The worker's half

    def claim(
        self,
        job_id: UUID,
        worker_id: str,
        *,
        lease_s: float = 30.0,
        alone: bool = False,
        token: UUID | None = None,
    ) -> Claim | None:
        """Take the job for `lease_s` seconds; counts the attempt. None when it is not there to be taken.

        alone: the worker holds nothing else and will not before this one ended; only so does it get a suspect.
        token: a fresh one, made by a caller who wants to vouch for a claim whose answer never came.
        A job whose stored spec this version cannot read is left for a while to workers of another, as a failed attempt.
        """
        with self._engines.writer.begin() as connection:
            claim = store_lease.claim(connection, job_id, worker_id, token or uuid4(), lease_s, alone=alone)
            failpoint("before_claim_commit")
        failpoint("after_claim_commit")
        return claim

    def is_suspect(self, job_id: UUID) -> bool:
        """Whether the job waits to be claimed alone."""
        with self._engines.reader.connect() as connection:
            return store_read.is_suspect(connection, job_id)

    def heartbeat(self, worker_id: str, tokens: Collection[UUID], *, lease_s: float = 30.0) -> Beat:
        """Extend this worker's leases of these tokens, in one statement.

        A lease that the worker itself gave up is not among them: extended with the rest it would never expire.
        """
        failpoint("heartbeat")
        with self._engines.writer.begin() as connection:
            return store_lease.beat(connection, worker_id, tokens, lease_s)

    def cancel_requested(self, worker_id: str) -> frozenset[UUID]:
        """The tokens of this worker's running jobs that are to be cancelled. Takes no lock: may be asked often."""
        wanted = sa.select(job.c.lease_token).where(job.c.worker_id == worker_id, is_in(State.running), cancel_wanted)
        with self._engines.reader.connect() as connection:
            return frozenset(connection.scalars(wanted))

    def finish(self, claim: Claim, outputs: Iterable[Output]) -> bool:
        """Record the images and end the job as succeeded. False: the lease is lost or the job was cancelled.

        Safe to repeat after an answer that never came: the second call finds its own token and says True.
        """
        with self._engines.writer.begin() as connection:
            shown = store_lease.finish(connection, claim, outputs)
            failpoint("before_finish_commit")
        failpoint("after_finish_commit")
        return shown

    def fail(self, claim: Claim, error: str, *, retry: bool, traceback: str | None = None) -> State | None:
        """Record the error. With `retry` and attempts left the job waits in the queue, longer each time; else it ends
        as failed. The state it is in now; None: the lease is lost. A job that was to be cancelled is.
        """
        wait_s = self._wait_s(claim.attempt)
        with self._engines.writer.begin() as connection:
            return store_lease.fail(connection, claim, error, traceback, retry=retry, wait_s=wait_s)

    def _wait_s(self, attempt: int) -> float:
        # Between half and all of the doubled time, so that jobs which failed together do not return together.
        return float(min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** (attempt - 1)) * self._rng.uniform(0.5, 1.0))

    def release(
        self,
        claim: Claim,
        *,
        wait_s: float = 0.0,
        reason: str | None = None,
        suspect: bool = False,
        saved_key: str | None = None,
    ) -> bool:
        """Give the job back, and the attempt with it: it was not its fault. False: the lease is lost.

        It may be claimed again after `wait_s`. `reason` is shown as its error meanwhile. `suspect`: it may be what
        broke a step of many, so it is to be rendered alone. `saved_key`: where its rows are kept.
        A job that was to be cancelled ends here instead.
        """
        with self._engines.writer.begin() as connection:
            released = store_lease.release(
                connection, [claim], wait_s=wait_s, reason=reason, suspect=suspect, saved_key=saved_key
            )
        return released == 1

    def release_all(self, claims: Sequence[Claim], *, reason: str | None = None, suspect: bool = False) -> int:
        """Give all these jobs back in one statement, for a process that has no time left; how many were still held."""
        with self._engines.writer.begin() as connection:
            return store_lease.release(connection, claims, reason=reason, suspect=suspect)

    def vouch(self, claim: Claim | Unanswered) -> bool:
        """Say that the worker lives although this lease of it expired: nobody crashed, so the job is no suspect.

        It must not render the job any more: one that nobody missed yet is released.
        False: nothing is left to be said, the job was claimed or ended meanwhile.
        """
        with self._engines.writer.begin() as connection:
            return store_lease.vouch(connection, claim)

    def confirm_cancelled(self, claim: Claim) -> bool:
        """End a running job as cancelled, as was asked. False: nobody asked, or the lease is lost."""
        with self._engines.writer.begin() as connection:
            return store_lease.end(connection, sa.and_(held(claim), cancel_wanted), State.cancelled) == 1

    def sweep(self) -> Sweep:
        """Take back expired leases: cancelled where that was asked, failed when the job crashed its workers alone,
        else queued again, as suspects."""
        with self._engines.writer.begin() as connection:
            return store_lease.sweep(connection)

    def due(
        self, limit: int, *, models: Collection[str] | None = None, older_than_s: float = 0.0, priority_from: int = 0
    ) -> list[Due]:
        """At most `limit` queued jobs of this priority or above, whose time has come and whose bell was never rung or
        is older than `older_than_s`; the most urgent first, then the oldest. Records that the bell rings now."""
        with self._engines.writer.begin() as connection:
            return store_lease.due(connection, limit, models, older_than_s, priority_from)

    # Reading

    def get(self, job_id: UUID) -> JobView:
        """The job as it is now. Raises JobNotFound."""
        with self._engines.reader.connect() as connection:
            found = store_read.jobs(connection, [job.c.id == job_id], limit=1)
        if not found:
            raise JobNotFound(f"there is no job {job_id}")
        return found[0]

    def jobs(
        self,
        *,
        ids: Collection[UUID] | None = None,
        batch: str | None = None,
        state: State | None = None,
        limit: int | None = None,
    ) -> list[JobView]:
        """The jobs that match, the newest first."""
        with self._engines.reader.connect() as connection:
            return store_read.jobs(connection, store_read.matching(ids=ids, batch=batch, state=state), limit=limit)

    def counts(self, batch: str | None = None) -> dict[State, int]:
        """How many jobs are in each state; every state is named."""
        with self._engines.reader.connect() as connection:
            return store_read.counts(connection, batch)

    def unfinished(self, models: Collection[str] | None = None) -> int:
        """How many jobs of these models, or of all, are queued or running."""
        with self._engines.reader.connect() as connection:
            return store_read.unfinished(connection, models)

    def claimable(self, models: Collection[str]) -> bool:
        """Whether a job of these models could be claimed now."""
        with self._engines.reader.connect() as connection:
            return store_read.claimable(connection, models)

    def states(self, job_ids: Collection[UUID]) -> dict[UUID, State]:
        """The state of each of these jobs that exists; cheap, for waiting."""
        with self._engines.reader.connect() as connection:
            return store_read.states(connection, job_ids)
