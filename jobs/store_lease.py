"""The store's UPDATEs of jobs that workers hold: a claim, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from jobs.db import db_now
from jobs.errors import InvalidSpec
from jobs.models import MAX_SOLO_CRASHES, image, job
from jobs.redaction import hide
from jobs.states import State, sources
from jobs.store_insert import as_row
from jobs.store_read import stored_spec
from jobs.views import Beat, Claim, Due, Output, Sweep, Unanswered

MAX_ERROR_CHARS = 4000
MAX_TRACEBACK_CHARS = 20_000
#: Until the next attempt at a job whose spec this version cannot read. Three of them last longer than it takes to
#: replace the workers of a house, one after the other; a newer one meanwhile reads what newer producers submit.
UNREADABLE_WAIT_S = 600.0

NO_LEASE: dict[str, Any] = {"lease_expires_at": None}
#: For a job that its own worker gave back: nothing is left that this worker could still vouch for.
GIVEN_BACK: dict[str, Any] = {**NO_LEASE, "lease_token": None}


def is_in(state: State) -> sa.ColumnElement[bool]:
    """Written out, not bound: only so does a database see that the partial index of that state answers."""
    return job.c.state == sa.literal_column(f"'{state}'")


def may_become(target: State) -> sa.ColumnElement[bool]:
    """The guard of every change of state."""
    return job.c.state.in_(sources(target))


def held(claim: Claim | Unanswered) -> sa.ColumnElement[bool]:
    """The fence: the job runs, and under this very claim."""
    return sa.and_(job.c.id == claim.job_id, is_in(State.running), job.c.lease_token == claim.token)


def _expired() -> sa.ColumnElement[bool]:
    return sa.and_(is_in(State.running), job.c.lease_expires_at <= db_now())


cancel_wanted = job.c.cancel_requested_at.is_not(None)
_attempts_left = job.c.attempts < job.c.max_attempts
_suspect = job.c.suspect.is_(True)
_one_if_suspect = sa.case((_suspect, 1), else_=0)
#: What the claim counted, given back: it did not end by the job's own fault.
_GIVE_BACK: dict[str, Any] = {
    "attempts": job.c.attempts - 1,
    "solo_crashes": job.c.solo_crashes - _one_if_suspect,
}


def claim(
    connection: Connection, job_id: UUID, worker_id: str, token: UUID, lease_s: float, *, alone: bool
) -> Claim | None:
    """Take the job; a suspect only `alone`. None when it is not there to be taken."""
    waiting = sa.and_(is_in(State.queued), job.c.available_at <= db_now())
    fit = sa.literal(True) if alone else ~_suspect
    statement = (
        sa.update(job)
        .where(job.c.id == job_id, waiting, fit, _attempts_left, ~cancel_wanted)
        .values(
            state=State.running,
            # Both are counted now, not when it has failed: a process that dies counts nothing any more.
            attempts=job.c.attempts + 1,
            solo_crashes=job.c.solo_crashes + _one_if_suspect,
            lease_token=token,
            lease_expires_at=db_now(lease_s),
            worker_id=worker_id,
            started_at=db_now(),
        )
        .returning(job.c.attempts, job.c.spec, job.c.suspect, job.c.saved_key)
    )
    row = connection.execute(statement).one_or_none()
    if row is None:
        return None
    try:
        spec = stored_spec(row.spec)
    except InvalidSpec as error:
        unread = Unanswered(job_id, token)
        fail(connection, unread, f"the stored spec: {error}", None, retry=True, wait_s=UNREADABLE_WAIT_S)
        return None
    return Claim(job_id, token, row.attempts, spec, worker_id, row.suspect, row.saved_key)


def beat(connection: Connection, worker_id: str, tokens: Collection[UUID], lease_s: float) -> Beat:
    """Extend the worker's leases of these tokens."""
    statement = (
        sa.update(job)
        .where(job.c.worker_id == worker_id, is_in(State.running), job.c.lease_token.in_(list(tokens)))
        .values(lease_expires_at=db_now(lease_s))
        # The bare column: SQLite 3.40 answers "IS NOT NULL" in a RETURNING with true whatever the row holds.
        .returning(job.c.lease_token, job.c.cancel_requested_at)
    )
    rows = connection.execute(statement).all()
    return Beat(
        held=frozenset(row.lease_token for row in rows if row.cancel_requested_at is None),
        cancelled=frozenset(row.lease_token for row in rows if row.cancel_requested_at is not None),
    )


def finish(connection: Connection, claim: Claim, outputs: Iterable[Output]) -> bool:
    """Record the images of a job that is still ours; True also when this very claim has done so before."""
    if end(connection, sa.and_(held(claim), ~cancel_wanted), State.succeeded, error=None, traceback=None):
        images = [{"job_id": claim.job_id, **as_row(output)} for output in outputs]
        if images:
            connection.execute(sa.insert(image), images)
        return True
    mine = sa.and_(job.c.id == claim.job_id, is_in(State.succeeded), job.c.lease_token == claim.token)
    return connection.scalar(sa.select(sa.literal(1)).where(mine)) is not None


def fail(
    connection: Connection, claim: Claim | Unanswered, error: str, traceback: str | None, *, retry: bool, wait_s: float
) -> State | None:
    """Back into the queue after `wait_s` when it may be tried again, else the end. None: the lease is lost."""
    again = sa.and_(sa.literal(retry), _attempts_left)
    ended = sa.or_(cancel_wanted, ~again)
    statement = (
        sa.update(job)
        .where(held(claim))
        .values(
            state=sa.case((cancel_wanted, State.cancelled), (again, State.queued), else_=State.failed),
            error=_text(error, MAX_ERROR_CHARS),
            traceback=None if traceback is None else _text(traceback, MAX_TRACEBACK_CHARS),
            # It raised, so the process lives: no crash.
            solo_crashes=job.c.solo_crashes - _one_if_suspect,
            # What it had saved may be what it failed of.
            saved_key=None,
            available_at=db_now(wait_s),
            finished_at=sa.case((ended, db_now()), else_=None),
            # The bell was heard; once the wait is over the sweeper rings afresh.
            rung_at=None,
            **GIVEN_BACK,
        )
        .returning(job.c.state)
    )
    state = connection.scalar(statement)
    return None if state is None else State(state)


def release(
    connection: Connection,
    claims: Sequence[Claim | Unanswered],
    *,
    wait_s: float = 0.0,
    reason: str | None = None,
    suspect: bool = False,
    saved_key: str | None = None,
) -> int:
    """Back into the queue with everything that the claims counted; how many, without those whose lease is lost."""
    values: dict[str, Any] = {"error": _text(reason, MAX_ERROR_CHARS)} if reason is not None else {}
    values |= {"suspect": True} if suspect else {}
    kept = job.c.saved_key if saved_key is None else sa.literal(saved_key)
    statement = (
        sa.update(job)
        .where(is_in(State.running), job.c.lease_token.in_([claim.token for claim in claims]))
        .where(job.c.id.in_([claim.job_id for claim in claims]))
        .values(
            state=sa.case((cancel_wanted, State.cancelled), else_=State.queued),
            available_at=db_now(wait_s),
            finished_at=sa.case((cancel_wanted, db_now()), else_=None),
            rung_at=None,
            saved_key=sa.case((cancel_wanted, None), else_=kept),
            **_GIVE_BACK,
            **GIVEN_BACK,
            **values,
        )
    )
    return connection.execute(statement).rowcount


def vouch(connection: Connection, claim: Claim | Unanswered) -> bool:
    """Take back what the sweep thought of a lost lease: its worker lives, so the job did not crash it."""
    if release(connection, [claim]):
        return True  # no sweep came yet; the next one would have suspected it after all
    # A suspect's claim counted one; a job that has none to give back was no suspect before this lease expired.
    alone = job.c.solo_crashes > 0
    cleared = {"suspect": alone, "solo_crashes": sa.case((alone, job.c.solo_crashes - 1), else_=0)}
    mine = sa.and_(job.c.id == claim.job_id, is_in(State.queued), job.c.lease_token == claim.token, _suspect)
    return connection.execute(sa.update(job).where(mine).values(lease_token=None, **cleared)).rowcount == 1


def sweep(connection: Connection) -> Sweep:
    """Take back expired leases: cancelled where that was asked, failed after the last solo crash, else queued again.

    One statement, for leases expire and cancels arrive at any moment: a row that only a second statement met would
    be queued for ever with its cancel, or be tried once more than the limit.
    """
    lost = sa.literal("the worker ") + sa.func.coalesce(job.c.worker_id, "?") + sa.literal(" stopped answering")
    alone = sa.literal(" while it rendered this job alone, as did those before it")
    crasher = sa.and_(_suspect, job.c.solo_crashes >= MAX_SOLO_CRASHES)
    # skip_locked: never waits, so it cannot deadlock with a heartbeat that takes the same rows in another order.
    chosen = sa.select(job.c.id).where(_expired()).with_for_update(skip_locked=True).cte("chosen")
    statement = (
        sa.update(job)
        .where(job.c.id.in_(sa.select(chosen.c.id)), _expired())
        .values(
            state=sa.case((cancel_wanted, State.cancelled), (crasher, State.failed), else_=State.queued),
            error=sa.case((cancel_wanted, job.c.error), (crasher, lost + alone), else_=lost),
            suspect=True,
            # A lost worker is no error of the job; only what it does alone is held against it.
            attempts=job.c.attempts - 1,
            # What it had saved may be what it crashes of.
            saved_key=sa.case((sa.or_(cancel_wanted, _suspect), None), else_=job.c.saved_key),
            available_at=db_now(),
            finished_at=sa.case((sa.or_(cancel_wanted, crasher), db_now()), else_=None),
            rung_at=None,
            **NO_LEASE,
        )
        .returning(job.c.state)
    )
    became = Counter(connection.scalars(statement))
    return Sweep(became[State.queued], failed=became[State.failed], cancelled=became[State.cancelled])


def end(connection: Connection, guard: sa.ColumnElement[bool], target: State, **values: Any) -> int:
    """Jobs that their own workers moved to the terminal state `target`: whatever they were suspected of, no crash."""
    solo_crashes = job.c.solo_crashes - _one_if_suspect
    statement = (
        sa.update(job)
        .where(guard, may_become(target))
        .values(state=target, finished_at=db_now(), saved_key=None, solo_crashes=solo_crashes, **NO_LEASE, **values)
    )
    return connection.execute(statement).rowcount


def due(
    connection: Connection, limit: int, models: Collection[str] | None, older_than_s: float, priority_from: int
) -> list[Due]:
    """The first `limit` queued jobs of this priority or above whose bell is old, in order; records that it rings."""
    statement = _due(None if models is None else tuple(models), older_than_s, priority_from)
    rows = sorted(connection.execute(statement, {"most": limit}).all(), key=lambda row: row[:3])
    return [Due(row.id, row.model, 9 - row.urgency) for row in rows]


@lru_cache(maxsize=16)  # a worker asks the same several times a second; to build it anew takes longer than the answer
def _due(models: tuple[str, ...] | None, older_than_s: float, priority_from: int) -> sa.Executable:
    bell_old = sa.or_(job.c.rung_at.is_(None), job.c.rung_at <= db_now(-older_than_s))
    chosen = sa.select(job.c.id).where(is_in(State.queued), job.c.available_at <= db_now(), bell_old)
    if models is not None:
        chosen = chosen.where(job.c.model.in_(models))
    if priority_from > 0:
        chosen = chosen.where(job.c.urgency <= 9 - priority_from)
    # skip_locked (SQLite ignores it): two sweepers share the work, neither waits for the other.
    in_order = chosen.order_by(job.c.urgency, job.c.created_at, job.c.id).limit(sa.bindparam("most", type_=sa.Integer))
    chosen = in_order.with_for_update(skip_locked=True)
    return (
        sa.update(job)
        # A CTE, so that PostgreSQL chooses once and never more than `most`.
        .where(job.c.id.in_(sa.select(chosen.cte("chosen").c.id)))
        .values(rung_at=db_now())
        .returning(job.c.urgency, job.c.created_at, job.c.id, job.c.model)
    )


def _text(text: str, limit: int) -> str:
    return hide(text).replace("\0", "")[:limit]
