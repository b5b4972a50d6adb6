"""The queue: every statement on the tables, on SQLite and PostgreSQL alike.

The statements that change a job are here, those that add jobs in `store_insert`, those that read in `store_read`;
nobody else writes SQL or imports the latter two. Each change of state is one guarded UPDATE on database time; a
guard that does not hold changes no row, and that is an outcome which the caller must handle. The guards come from
`states.TRANSITIONS`.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from jobs import store_insert, store_read
from jobs.db import Engines, db_now, open_engines
from jobs.errors import InvalidSpec, JobConflict, JobNotFound
from jobs.models import image, job
from jobs.spec import JobSpec
from jobs.states import State, sources
from jobs.views import Beat, Claim, Due, JobView, Output, Sweep

#: Seconds until the next attempt after the first error; doubled for each further one.
BACKOFF_S = 2.0
MAX_BACKOFF_S = 300.0
MAX_ERROR_CHARS = 4000

_NO_LEASE: dict[str, Any] = {"lease_expires_at": None}


def _is(state: State) -> sa.ColumnElement[bool]:
    """Written out, not bound: only so does a database see that the partial index of that state answers."""
    return job.c.state == sa.literal_column(f"'{state}'")


def _may_become(target: State) -> sa.ColumnElement[bool]:
    return job.c.state.in_(sources(target))


def _held(claim: Claim) -> sa.ColumnElement[bool]:
    """The fence: the job runs, and under this very claim."""
    return sa.and_(job.c.id == claim.job_id, _is(State.running), job.c.lease_token == claim.token)


def _expired() -> sa.ColumnElement[bool]:
    return sa.and_(_is(State.running), job.c.lease_expires_at <= db_now())


_cancel_wanted = job.c.cancel_requested_at.is_not(None)
_attempts_left = job.c.attempts < job.c.max_attempts


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
        return [known[row.idempotency_key] if row.idempotency_key else fresh[row.id] for row in rows]

    def cancel(self, job_id: UUID) -> State:
        """Cancel a queued job at once; ask the worker of a running one. The state that the job is in now.

        Raises JobNotFound, or JobConflict when the job has ended.
        """
        at_once = _is(State.queued)
        statement = (
            sa.update(job)
            .where(job.c.id == job_id, _may_become(State.cancelled))
            .values(
                state=sa.case((at_once, State.cancelled), else_=job.c.state),
                finished_at=sa.case((at_once, db_now()), else_=job.c.finished_at),
                cancel_requested_at=sa.func.coalesce(job.c.cancel_requested_at, db_now()),
            )
            .returning(job.c.state)
        )
        with self._engines.writer.begin() as connection:
            state = connection.scalar(statement)
            if state is None:
                self._refuse(connection, job_id, "cancelled")
            return State(state)

    def retry(self, job_id: UUID) -> None:
        """Put a failed job back, with all its attempts. Raises JobNotFound, or JobConflict for any other state."""
        statement = (
            sa.update(job)
            .where(job.c.id == job_id, _is(State.failed))
            .values(state=State.queued, attempts=0, available_at=db_now(), finished_at=None, rung_at=None, **_NO_LEASE)
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

    def claim(self, job_id: UUID, worker_id: str, *, lease_s: float = 30.0) -> Claim | None:
        """Take the job for `lease_s` seconds; counts the attempt. None when it is not there to be taken.

        A job whose stored spec this version cannot read fails at once, with the reason.
        """
        token = uuid4()
        waiting = sa.and_(_is(State.queued), job.c.available_at <= db_now())
        statement = (
            sa.update(job)
            .where(job.c.id == job_id, sa.or_(waiting, _expired()), _attempts_left, ~_cancel_wanted)
            .values(
                state=State.running,
                attempts=job.c.attempts + 1,
                lease_token=token,
                lease_expires_at=db_now(lease_s),
                worker_id=worker_id,
                started_at=db_now(),
            )
            .returning(job.c.attempts, job.c.spec)
        )
        with self._engines.writer.begin() as connection:
            row = connection.execute(statement).one_or_none()
            if row is None:
                return None
            try:
                return Claim(job_id, token, row.attempts, store_read.stored_spec(row.spec), worker_id)
            except InvalidSpec as error:
                self._end(connection, _running_under(job_id, token), State.failed, error=f"the stored spec: {error}")
                return None

    def heartbeat(self, worker_id: str, tokens: Collection[UUID], *, lease_s: float = 30.0) -> Beat:
        """Extend this worker's leases of these tokens, in one statement.

        A lease that the worker itself gave up is not among them: extended with the rest it would never expire.
        """
        statement = (
            sa.update(job)
            .where(job.c.worker_id == worker_id, _is(State.running), job.c.lease_token.in_(list(tokens)))
            .values(lease_expires_at=db_now(lease_s))
            # The bare column: SQLite 3.40 answers "IS NOT NULL" in a RETURNING with true whatever the row holds.
            .returning(job.c.lease_token, job.c.cancel_requested_at)
        )
        with self._engines.writer.begin() as connection:
            rows = connection.execute(statement).all()
        return Beat(
            held=frozenset(row.lease_token for row in rows if row.cancel_requested_at is None),
            cancelled=frozenset(row.lease_token for row in rows if row.cancel_requested_at is not None),
        )

    def cancel_requested(self, worker_id: str) -> frozenset[UUID]:
        """The tokens of this worker's running jobs that are to be cancelled. Takes no lock: may be asked often."""
        wanted = sa.select(job.c.lease_token).where(job.c.worker_id == worker_id, _is(State.running), _cancel_wanted)
        with self._engines.reader.connect() as connection:
            return frozenset(connection.scalars(wanted))

    def finish(self, claim: Claim, outputs: Iterable[Output]) -> bool:
        """Record the images and end the job as succeeded. False: the lease is lost or the job was cancelled.

        Safe to repeat after an answer that never came: the second call finds its own token and says True.
        """
        images = [{"job_id": claim.job_id, **store_insert.as_row(output)} for output in outputs]
        with self._engines.writer.begin() as connection:
            if self._end(connection, sa.and_(_held(claim), ~_cancel_wanted), State.succeeded, error=None):
                if images:
                    connection.execute(sa.insert(image), images)
                return True
            mine = sa.select(sa.literal(1)).where(
                job.c.id == claim.job_id, _is(State.succeeded), job.c.lease_token == claim.token
            )
            return connection.scalar(mine) is not None

    def fail(self, claim: Claim, error: str, *, retry: bool) -> State | None:
        """Record the error. With `retry` and attempts left the job waits in the queue, longer each time; else it ends
        as failed, or as cancelled when that was asked for. The state now; None: the lease is lost."""
        again = sa.and_(sa.literal(retry), _attempts_left)
        state = sa.case((_cancel_wanted, State.cancelled), (again, State.queued), else_=State.failed)
        ended = sa.or_(_cancel_wanted, ~again)
        statement = (
            sa.update(job)
            .where(_held(claim))
            .values(
                state=state,
                error=error.replace("\0", "")[:MAX_ERROR_CHARS],
                available_at=db_now(self._wait_s(claim.attempt)),
                finished_at=sa.case((ended, db_now()), else_=None),
                # The bell was heard; once the wait is over the sweeper rings afresh.
                rung_at=None,
                **_NO_LEASE,
            )
            .returning(job.c.state)
        )
        with self._engines.writer.begin() as connection:
            state_now = connection.scalar(statement)
        return None if state_now is None else State(state_now)

    def _wait_s(self, attempt: int) -> float:
        # Between half and all of the doubled time, so that jobs which failed together do not return together.
        return float(min(MAX_BACKOFF_S, self._backoff_s * 2.0 ** (attempt - 1)) * self._rng.uniform(0.5, 1.0))

    def release(self, claim: Claim) -> bool:
        """Give the job back unrendered, and the attempt with it. False: the lease is lost.

        A job that was to be cancelled ends here instead.
        """
        statement = (
            sa.update(job)
            .where(_held(claim))
            .values(
                state=sa.case((_cancel_wanted, State.cancelled), else_=State.queued),
                attempts=job.c.attempts - 1,
                available_at=db_now(),
                finished_at=sa.case((_cancel_wanted, db_now()), else_=None),
                rung_at=None,
                **_NO_LEASE,
            )
        )
        with self._engines.writer.begin() as connection:
            return connection.execute(statement).rowcount == 1

    def confirm_cancelled(self, claim: Claim) -> bool:
        """End a running job as cancelled, as was asked. False: nobody asked, or the lease is lost."""
        with self._engines.writer.begin() as connection:
            return self._end(connection, sa.and_(_held(claim), _cancel_wanted), State.cancelled) == 1

    def sweep(self) -> Sweep:
        """Take back expired leases: cancelled where that was asked, failed without attempts left, else queued again."""
        lost = sa.literal("the worker ") + sa.func.coalesce(job.c.worker_id, "?") + sa.literal(" stopped answering")
        with self._engines.writer.begin() as connection:
            cancelled = self._end(connection, sa.and_(_expired(), _cancel_wanted), State.cancelled)
            failed = self._end(connection, sa.and_(_expired(), ~_attempts_left), State.failed, error=lost)
            requeue = (
                sa.update(job)
                .where(_expired())
                .values(state=State.queued, error=lost, available_at=db_now(), rung_at=None, **_NO_LEASE)
            )
            requeued = connection.execute(requeue).rowcount
        return Sweep(requeued=requeued, failed=failed, cancelled=cancelled)

    def _end(self, connection: Connection, guard: sa.ColumnElement[bool], target: State, **values: Any) -> int:
        """Jobs that this moved to the terminal state `target`."""
        statement = (
            sa.update(job)
            .where(guard, _may_become(target))
            .values(state=target, finished_at=db_now(), **_NO_LEASE, **values)
        )
        return connection.execute(statement).rowcount

    def due(self, limit: int, *, models: Collection[str] | None = None, older_than_s: float = 0.0) -> list[Due]:
        """At most `limit` queued jobs whose time has come and whose bell was never rung or is older than
        `older_than_s`; the most urgent first, then the oldest. Records that the bell rings now."""
        bell_old = sa.or_(job.c.rung_at.is_(None), job.c.rung_at <= db_now(-older_than_s))
        chosen = sa.select(job.c.id).where(_is(State.queued), job.c.available_at <= db_now(), bell_old)
        if models is not None:
            chosen = chosen.where(job.c.model.in_(models))
        # skip_locked (SQLite ignores it): two sweepers share the work, neither waits for the other.
        chosen = (
            chosen.order_by(job.c.urgency, job.c.created_at, job.c.id).limit(limit).with_for_update(skip_locked=True)
        )
        statement = (
            sa.update(job)
            # A CTE, so that PostgreSQL chooses once and never more than `limit`.
            .where(job.c.id.in_(sa.select(chosen.cte("chosen").c.id)))
            .values(rung_at=db_now())
            .returning(job.c.urgency, job.c.created_at, job.c.id, job.c.model)
        )
        with self._engines.writer.begin() as connection:
            rows = sorted(connection.execute(statement).all(), key=lambda row: row[:3])
        return [Due(row.id, row.model, 9 - row.urgency) for row in rows]

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

    def states(self, job_ids: Collection[UUID]) -> dict[UUID, State]:
        """The state of each of these jobs that exists; cheap, for waiting."""
        with self._engines.reader.connect() as connection:
            return store_read.states(connection, job_ids)


def _running_under(job_id: UUID, token: UUID) -> sa.ColumnElement[bool]:
    return sa.and_(job.c.id == job_id, job.c.lease_token == token)
