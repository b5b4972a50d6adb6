"""The tables. Every change here needs a migration; a test shows that autogenerate has nothing to add."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from sqlalchemy.engine import Dialect

from jobs.states import State

#: The Alembic revision that these tables are; a test holds it equal to the newest migration.
SCHEMA_REVISION = "0002"
MAX_ATTEMPTS = 3
#: How often a job may take its process with it while it is rendered alone.
MAX_SOLO_CRASHES = 3

metadata = sa.MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_ix",
        "uq": "%(table_name)s_%(column_0_N_name)s_uq",
        "ck": "%(table_name)s_%(constraint_name)s_ck",
        "fk": "%(table_name)s_%(column_0_N_name)s_fk",
        "pk": "%(table_name)s_pk",
    }
)


class Timestamp(sa.types.TypeDecorator[datetime]):
    """An instant in UTC. SQLite keeps it as text of fixed width, so that text order is time order."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        # SQLite keeps no time zone; PostgreSQL answers in the one of its server.
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


batch = sa.Table(
    "batch",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("created_at", Timestamp, nullable=False),
)

job = sa.Table(
    "job",
    metadata,
    sa.Column("id", sa.Uuid, primary_key=True),
    sa.Column("batch_id", sa.Uuid, sa.ForeignKey("batch.id")),
    sa.Column("idempotency_key", sa.String(200), unique=True),
    sa.Column("state", sa.String(16), nullable=False),
    # The spec's JSON, kept as text: the database never looks inside, and bulk submits stay fast.
    sa.Column("spec", sa.Text, nullable=False),
    # Copies of two fields of the spec that `due` chooses by. `urgency` is 9 - priority: all of
    # (urgency, created_at, id) then ascend and one plain index serves the order on both databases.
    sa.Column("model", sa.String(64), nullable=False),
    sa.Column("urgency", sa.SmallInteger, nullable=False),
    sa.Column("attempts", sa.SmallInteger, nullable=False),
    sa.Column("max_attempts", sa.SmallInteger, nullable=False),
    # A suspect was held by a worker that stopped answering: it is rendered alone until it ends, and `solo_crashes`
    # counts the processes that it took with it then. Like `attempts` counted at the claim: a crash counts nothing.
    sa.Column("suspect", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("solo_crashes", sa.SmallInteger, nullable=False, server_default=sa.text("0")),
    sa.Column("error", sa.Text),
    sa.Column("traceback", sa.Text),
    # Where a released job's rows are kept in storage, so that the next worker goes on from their step.
    sa.Column("saved_key", sa.String(1024)),
    sa.Column("created_at", Timestamp, nullable=False),
    sa.Column("available_at", Timestamp, nullable=False),
    sa.Column("rung_at", Timestamp),
    sa.Column("started_at", Timestamp),
    sa.Column("finished_at", Timestamp),
    sa.Column("cancel_requested_at", Timestamp),
    # The token outlives the lease: a worker whose commit got no answer learns by it whether the result is its own.
    sa.Column("lease_token", sa.Uuid),
    sa.Column("lease_expires_at", Timestamp),
    sa.Column("worker_id", sa.String(200)),
    sa.CheckConstraint(f"state IN ({', '.join(repr(str(state)) for state in State)})", name="state"),
)

_queued = sa.text("state = 'queued'")
_running = sa.text("state = 'running'")
sa.Index("job_due_ix", job.c.urgency, job.c.created_at, job.c.id, sqlite_where=_queued, postgresql_where=_queued)
sa.Index("job_expiry_ix", job.c.lease_expires_at, sqlite_where=_running, postgresql_where=_running)
sa.Index("job_worker_ix", job.c.worker_id, sqlite_where=_running, postgresql_where=_running)
sa.Index("job_batch_ix", job.c.batch_id, job.c.state)
sa.Index("job_created_ix", job.c.created_at, job.c.id)

image = sa.Table(
    "image",
    metadata,
    sa.Column("job_id", sa.Uuid, sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("index", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("key", sa.String(1024), nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
)
