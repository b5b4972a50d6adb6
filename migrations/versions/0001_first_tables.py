"""The first tables: batch, job, image.

Revision ID: 0001
Revises: none
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "batch",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="batch_pk"),
        sa.UniqueConstraint("name", name="batch_name_uq"),
    )
    op.create_table(
        "job",
        sa.Column("id", sa.Uuid, nullable=False),
        sa.Column("batch_id", sa.Uuid),
        sa.Column("idempotency_key", sa.String(200)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("model", sa.String(64), nullable=False),
        sa.Column("urgency", sa.SmallInteger, nullable=False),
        sa.Column("attempts", sa.SmallInteger, nullable=False),
        sa.Column("max_attempts", sa.SmallInteger, nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("available_at", _INSTANT, nullable=False),
        sa.Column("rung_at", _INSTANT),
        sa.Column("started_at", _INSTANT),
        sa.Column("finished_at", _INSTANT),
        sa.Column("cancel_requested_at", _INSTANT),
        sa.Column("lease_token", sa.Uuid),
        sa.Column("lease_expires_at", _INSTANT),
        sa.Column("worker_id", sa.String(200)),
        sa.PrimaryKeyConstraint("id", name="job_pk"),
        sa.ForeignKeyConstraint(["batch_id"], ["batch.id"], name="job_batch_id_fk"),
        sa.UniqueConstraint("idempotency_key", name="job_idempotency_key_uq"),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')", name=op.f("job_state_ck")
        ),
    )
    queued, running = sa.text("state = 'queued'"), sa.text("state = 'running'")
    op.create_index("job_due_ix", "job", ["urgency", "created_at", "id"], sqlite_where=queued, postgresql_where=queued)
    op.create_index("job_expiry_ix", "job", ["lease_expires_at"], sqlite_where=running, postgresql_where=running)
    op.create_index("job_worker_ix", "job", ["worker_id"], sqlite_where=running, postgresql_where=running)
    op.create_index("job_batch_ix", "job", ["batch_id", "state"])
    op.create_index("job_created_ix", "job", ["created_at", "id"])
    op.create_table(
        "image",
        sa.Column("job_id", sa.Uuid, nullable=False),
        sa.Column("index", sa.SmallInteger, nullable=False, autoincrement=False),
        sa.Column("key", sa.String(1024), nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("width", sa.Integer, nullable=False),
        sa.Column("height", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("job_id", "index", name="image_pk"),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="image_job_id_fk", ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("image")
    op.drop_table("job")
    op.drop_table("batch")
