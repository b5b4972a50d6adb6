"""Alembic's entry: migrates on the connection that `jobs.schema` hands over, or on the settings' database."""

from __future__ import annotations

from alembic import context
from sqlalchemy.engine import Connection

from jobs.db import open_engines
from jobs.models import metadata
from jobs.settings import Settings


def run(connection: Connection) -> None:
    """Run on this connection. Batch mode, because SQLite cannot alter a table in place."""
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


handed_over: Connection | None = context.config.attributes.get("connection")
if handed_over is not None:
    run(handed_over)
else:  # `alembic revision --autogenerate`, by a developer
    with open_engines(Settings().database_url).writer.begin() as own:
        run(own)
