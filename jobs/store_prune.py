"""The store's statements for housekeeping: what is old, what of it may go, and which objects the rows still need.

A few thousand rows in each transaction, so that workers never wait for one, and each of them safe beside a second
process that does the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from jobs import store_read
from jobs.db import Engines, db_now
from jobs.models import batch as batch_table
from jobs.models import image, job
from jobs.states import State
from jobs.store_lease import is_in, may_become
from jobs.store_read import chunks
from jobs.views import Output

_INPUT = re.compile(r'"(inputs/[0-9A-Za-z._-]+)"')
#: No transaction that inserts jobs lasts longer.
_LONGEST_INSERT = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs are old: ended as one of `states` before `before` (the database's time), of one batch or of all."""

    before: datetime
    states: Collection[State]
    batch: str | None = None


@dataclass(frozen=True, slots=True)
class Going:
    """A job that may go. objects: keys that only its rows name; inputs: keys that other jobs may name too."""

    id: UUID
    created_at: datetime
    objects: frozenset[str]
    inputs: frozenset[str]


@dataclass(frozen=True, slots=True)
class Shown:
    """What a job that succeeded shows."""

    id: UUID
    created_at: datetime
    images: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Needed:
    """What the rows of one job still need: its objects, and whatever is under the token of a claim that lives."""

    objects: frozenset[str]
    token: UUID | None


class Housekeeper:
    """Statements on whole sets of jobs. Safe to share between threads."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines

    def now(self) -> datetime:
        """The database's clock."""
        with self._engines.reader.connect() as connection:
            now: datetime = connection.execute(sa.select(db_now())).scalar_one()
            return now

    def count(self, old: Filter) -> int:
        """How many jobs may go."""
        with self._engines.reader.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(job).where(*_old(old))) or 0

    def going(self, old: Filter, after: Going | None, limit: int) -> list[Going]:
        """The next `limit` jobs that may go, the oldest first; `after`: the last one that was looked at."""
        conditions = _old(old)
        if after is not None:
            conditions.append(_later_than(after.created_at, after.id))
        columns = sa.select(job.c.id, job.c.created_at, job.c.spec, job.c.saved_key)
        with self._engines.reader.connect() as connection:
            rows = connection.execute(
                columns.where(*conditions).order_by(job.c.created_at, job.c.id).limit(limit)
            ).all()
            keys = _image_keys(connection, [row.id for row in rows])
        return [
            Going(row.id, row.created_at, keys[row.id] | ({row.saved_key} - {None}), input_keys(row.spec))
            for row in rows
        ]

    def remove(self, ids: Collection[UUID], old: Filter) -> set[UUID]:
        """Delete those of the jobs that are still old, with their images' rows; which ones went.

        One that a person brought back since it was looked at stays.
        """
        # skip_locked: two that prune at once share the work instead of waiting for one another.
        chosen = sa.select(job.c.id).where(job.c.id.in_(list(ids)), *_old(old)).with_for_update(skip_locked=True)
        # A CTE, so that PostgreSQL chooses, and locks, once.
        statement = sa.delete(job).where(job.c.id.in_(sa.select(chosen.cte("chosen").c.id))).returning(job.c.id)
        with self._engines.writer.begin() as connection:
            return set(connection.scalars(statement))

    def remove_batches(self, before: datetime, limit: int) -> int:
        """Delete at most `limit` batches of before that time that have no jobs any more; how many that were."""
        empty = ~sa.exists().where(job.c.batch_id == batch_table.c.id)
        chosen = sa.select(batch_table.c.id).where(empty, batch_table.c.created_at <= before).limit(limit)
        # A submit holds the batch that it adds to, so such a one is skipped.
        chosen = chosen.with_for_update(skip_locked=True)
        statement = sa.delete(batch_table).where(batch_table.c.id.in_(sa.select(chosen.cte("chosen").c.id)))
        with self._engines.writer.begin() as connection:
            # Counted by what comes back: of a statement with a CTE, SQLite's driver knows no rowcount.
            return len(connection.execute(statement.returning(batch_table.c.id)).all())

    def needed(self, ids: Collection[UUID]) -> dict[UUID, Needed]:
        """What those of the jobs that exist need of the objects under their name."""
        columns = sa.select(job.c.id, job.c.lease_token, job.c.saved_key, is_in(State.running).label("running"))
        with self._engines.reader.connect() as connection:
            # The jobs first: one that succeeds in between has its images' rows by then.
            rows = [row for some in chunks(list(ids)) for row in connection.execute(columns.where(job.c.id.in_(some)))]
            keys = _image_keys(connection, [row.id for row in rows])
        return {
            row.id: Needed(keys[row.id] | ({row.saved_key} - {None}), row.lease_token if row.running else None)
            for row in rows
        }

    def inputs_named(self, after: UUID | None, limit: int) -> tuple[dict[UUID, frozenset[str]], UUID | None]:
        """The inputs that each of the next `limit` jobs names, and the last job looked at (None: that was all)."""
        names_some = job.c.spec.like('%"inputs/%')
        columns = sa.select(job.c.id, sa.case((names_some, job.c.spec), else_="").label("spec"))
        if after is not None:
            columns = columns.where(job.c.id > after)
        with self._engines.reader.connect() as connection:
            rows = connection.execute(columns.order_by(job.c.id).limit(limit)).all()
        return {row.id: input_keys(row.spec) for row in rows if row.spec}, rows[-1].id if rows else None

    def inputs_named_since(self, since: datetime) -> frozenset[str]:
        """The inputs of jobs that were inserted, or whose insert was committed, after `since`."""
        recent = sa.select(job.c.spec).where(job.c.created_at >= since - _LONGEST_INSERT)
        with self._engines.reader.connect() as connection:
            specs = connection.scalars(recent.where(job.c.spec.like('%"inputs/%')))
            return frozenset(key for spec in specs for key in input_keys(spec))

    def shown(self, batch: str | None, after: Shown | None, limit: int) -> list[Shown]:
        """The images of the next `limit` jobs that succeeded, the oldest first."""
        conditions = [job.c.state == State.succeeded]
        if batch is not None:
            conditions.append(_of_batch(batch))
        if after is not None:
            conditions.append(_later_than(after.created_at, after.id))
        columns = sa.select(job.c.id, job.c.created_at).where(*conditions)
        with self._engines.reader.connect() as connection:
            rows = connection.execute(columns.order_by(job.c.created_at, job.c.id).limit(limit)).all()
            images = store_read.images(connection, [row.id for row in rows])
        return [Shown(row.id, row.created_at, tuple(images[row.id])) for row in rows]

    def queue_again(self, job_id: UUID, key: str, reason: str) -> bool:
        """Put a succeeded job back, without its images; False when it does not show the image `key` any more."""
        shows = sa.exists().where(image.c.job_id == job_id, image.c.key == key)
        values: dict[str, Any] = {"attempts": 0, "error": reason, "available_at": db_now()}
        values |= {"finished_at": None, "rung_at": None, "lease_token": None}
        values |= {"suspect": job.c.solo_crashes > 0, "solo_crashes": 0}
        statement = (
            sa.update(job)
            .where(job.c.id == job_id, is_in(State.succeeded), may_become(State.queued), shows)
            .values(state=State.queued, **values)
        )
        with self._engines.writer.begin() as connection:
            if not connection.execute(statement).rowcount:
                return False
            connection.execute(sa.delete(image).where(image.c.job_id == job_id))
        return True


def input_keys(spec: str) -> frozenset[str]:
    """The inputs that a stored spec names; read as text, so that also a spec of another version keeps its pictures."""
    return frozenset(_INPUT.findall(spec))


def _old(old: Filter) -> list[sa.ColumnElement[bool]]:
    # created_at as well, though it follows from the rest: it has an index.
    conditions = [
        job.c.state.in_(list(old.states)),
        job.c.finished_at <= old.before,
        job.c.created_at <= old.before,
    ]
    if old.batch is not None:
        conditions.append(_of_batch(old.batch))
    return conditions


def _of_batch(name: str) -> sa.ColumnElement[bool]:
    named: sa.ColumnElement[Any] = sa.select(batch_table.c.id).where(batch_table.c.name == name).scalar_subquery()
    return job.c.batch_id == named


def _later_than(created_at: datetime, id: UUID) -> sa.ColumnElement[bool]:
    last = sa.literal(created_at, job.c.created_at.type), sa.literal(id, job.c.id.type)
    return sa.tuple_(job.c.created_at, job.c.id) > sa.tuple_(*last)


def _image_keys(connection: Connection, ids: Sequence[UUID]) -> dict[UUID, frozenset[str]]:
    found = store_read.images(connection, ids)
    return {job_id: frozenset(each.key for each in found[job_id]) for job_id in ids}
