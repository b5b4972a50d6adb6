"""The store's SELECTs, and how a row becomes a view."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar
from uuid import UUID

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine import Connection, Row

from jobs.db import db_now
from jobs.errors import InvalidSpec
from jobs.models import batch as batch_table
from jobs.models import image, job
from jobs.spec import JobSpec, describe_errors
from jobs.states import State
from jobs.views import JobView, Output

Item = TypeVar("Item")
#: Values in one IN list: far below the limit of SQLite (32766) and PostgreSQL (65535) on bound parameters.
CHUNK = 500


def chunks(items: Sequence[Item], size: int = CHUNK) -> Iterator[Sequence[Item]]:
    """The items in slices of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def stored_spec(text: str) -> JobSpec:
    """The spec of a row. Raises InvalidSpec when this version of the code cannot read it."""
    try:
        return JobSpec.model_validate_json(text)
    except ValidationError as error:
        raise InvalidSpec(*describe_errors(error)) from None


def matching(
    *, ids: Collection[UUID] | None = None, batch: str | None = None, state: State | None = None
) -> list[sa.ColumnElement[bool]]:
    """The conditions of `Store.jobs`."""
    conditions: list[sa.ColumnElement[bool]] = []
    if ids is not None:
        conditions.append(job.c.id.in_(ids))
    if batch is not None:
        conditions.append(batch_table.c.name == batch)
    if state is not None:
        conditions.append(job.c.state == state)
    return conditions


def jobs(
    connection: Connection, conditions: Iterable[sa.ColumnElement[bool]], *, limit: int | None = None
) -> list[JobView]:
    """The jobs for which all conditions hold, with their images, the newest first."""
    statement = (
        sa.select(job, batch_table.c.name.label("batch"))
        .outerjoin(batch_table, job.c.batch_id == batch_table.c.id)
        .where(*conditions)
        .order_by(job.c.created_at.desc(), job.c.id.desc())
        .limit(limit)
    )
    rows = connection.execute(statement).all()
    found = images(connection, [row.id for row in rows if row.state == State.succeeded])
    return [_view(row, found[row.id]) for row in rows]


def images(connection: Connection, job_ids: Sequence[UUID]) -> defaultdict[UUID, list[Output]]:
    """The images of each of these jobs, in order."""
    found: defaultdict[UUID, list[Output]] = defaultdict(list)
    for some in chunks(job_ids):
        rows = connection.execute(sa.select(image).where(image.c.job_id.in_(some)).order_by(image.c.index))
        for job_id, *columns in rows:
            found[job_id].append(Output(*columns))
    return found


def _view(row: Row[tuple[object, ...]], images: Iterable[Output]) -> JobView:
    return JobView(
        id=row.id,
        state=State(row.state),
        attempts=row.attempts,
        error=row.error,
        stored=_spec_or_reason(row.spec),
        batch=row.batch,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        images=tuple(images),
        traceback=row.traceback,
        suspect=row.suspect,
        solo_crashes=row.solo_crashes,
    )


def _spec_or_reason(text: str) -> JobSpec | InvalidSpec:
    try:
        return stored_spec(text)
    except InvalidSpec as reason:
        return reason


def jobs_of_keys(connection: Connection, keys: Sequence[str]) -> dict[str, JobView]:
    """The job of each idempotency key that is known."""
    ids = {
        key: job_id
        for some in chunks(keys)
        for job_id, key in connection.execute(
            sa.select(job.c.id, job.c.idempotency_key).where(job.c.idempotency_key.in_(some))
        )
    }
    views = {view.id: view for some in chunks(list(ids.values())) for view in jobs(connection, matching(ids=some))}
    return {key: views[job_id] for key, job_id in ids.items()}


def counts(connection: Connection, batch: str | None) -> dict[State, int]:
    """How many jobs are in each state."""
    statement = sa.select(job.c.state, sa.func.count()).group_by(job.c.state)
    if batch is not None:
        statement = statement.join(batch_table, job.c.batch_id == batch_table.c.id).where(batch_table.c.name == batch)
    found = {State(state): count for state, count in connection.execute(statement)}
    return {state: found.get(state, 0) for state in State}


def states(connection: Connection, job_ids: Collection[UUID]) -> dict[UUID, State]:
    """The state of each of these jobs that exists."""
    return {
        job_id: State(state)
        for some in chunks(list(job_ids))
        for job_id, state in connection.execute(sa.select(job.c.id, job.c.state).where(job.c.id.in_(some)))
    }


def is_suspect(connection: Connection, job_id: UUID) -> bool:
    """Whether the job is queued and a suspect."""
    waiting = sa.select(sa.literal(1)).where(job.c.id == job_id, job.c.state == State.queued, job.c.suspect.is_(True))
    return connection.scalar(waiting) is not None


def unfinished(connection: Connection, models: Collection[str] | None) -> int:
    """How many jobs of these models, or of all, have not ended."""
    statement = sa.select(sa.func.count()).where(job.c.state.in_((State.queued, State.running)))
    if models is not None:
        statement = statement.where(job.c.model.in_(models))
    return connection.scalar(statement) or 0


def claimable(connection: Connection, models: Collection[str]) -> bool:
    """Whether a job of these models could be claimed now."""
    waiting = sa.and_(job.c.state == State.queued, job.c.available_at <= db_now(), job.c.cancel_requested_at.is_(None))
    one = sa.select(sa.literal(1)).where(waiting, job.c.model.in_(models)).limit(1)
    return connection.scalar(one) is not None
