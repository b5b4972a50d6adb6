"""The store's SELECTs that show whether the queue moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from jobs.db import db_now
from jobs.models import job
from jobs.states import State
from jobs.store_lease import is_in


@dataclass(frozen=True, slots=True)
class Waiting:
    """The queued jobs of one model whose time has come. claimed: when a worker last took a job of this model."""

    model: str
    jobs: int
    since: datetime
    claimed: datetime | None


def now(connection: Connection) -> datetime:
    """The database's clock."""
    instant: datetime = connection.execute(sa.select(db_now())).scalar_one()
    return instant


def waiting(connection: Connection) -> Sequence[Waiting]:
    """One entry for each model that jobs wait for."""
    due = sa.and_(is_in(State.queued), job.c.available_at <= db_now())
    # A column of MIN(available_at) is text to SQLite's driver unless it is told its type.
    oldest = sa.type_coerce(sa.func.min(job.c.available_at), job.c.available_at.type)
    latest = sa.type_coerce(sa.func.max(job.c.started_at), job.c.started_at.type)
    models = connection.execute(sa.select(job.c.model, sa.func.count(), oldest).where(due).group_by(job.c.model)).all()
    return [
        Waiting(model, count, since, connection.scalar(sa.select(latest).where(job.c.model == model)))
        for model, count, since in models
    ]


def expired(connection: Connection, seconds: float) -> int:
    """How many leases expired longer ago than that, and nobody took them back."""
    old = sa.and_(is_in(State.running), job.c.lease_expires_at <= db_now(-seconds))
    return connection.scalar(sa.select(sa.func.count()).select_from(job).where(old)) or 0
