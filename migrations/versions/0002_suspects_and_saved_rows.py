"""Suspects of a crash, the traceback of an error, and the saved rows of a released job.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("suspect", sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("job", sa.Column("solo_crashes", sa.SmallInteger, nullable=False, server_default=sa.text("0")))
    op.add_column("job", sa.Column("traceback", sa.Text))
    op.add_column("job", sa.Column("saved_key", sa.String(1024)))


def downgrade() -> None:
    for name in ("saved_key", "traceback", "solo_crashes", "suspect"):
        op.drop_column("job", name)
