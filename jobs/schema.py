"""The tables' version: whether the database has it, and how it gets it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection

from jobs.db import Engines, ping
from jobs.errors import SchemaOutdated
from jobs.models import SCHEMA_REVISION

#: Any constant will do, as long as every process that migrates takes the same one.
_ADVISORY_LOCK = 6_178_104_212


def migrations_folder() -> Path:
    """Where the migrations are: installed as `jobs.migrations`, or beside the packages in a checkout."""
    installed = importlib.util.find_spec("jobs.migrations")
    places = [Path(place) for place in installed.submodule_search_locations or ()] if installed else []
    places.append(Path(__file__).resolve().parent.parent / "migrations")
    for place in places:
        if (place / "env.py").is_file():
            return place
    raise SchemaOutdated("this installation has no migrations; install nightshift anew")


def current_revision(connection: Connection) -> str | None:
    """The revision that the tables are at; None for an empty database."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(engines: Engines, revision: str = "head") -> str | None:
    """Bring the tables to this revision; the one they were at. Processes that call this at once take turns."""
    return _migrate(engines, command.upgrade, revision)


def downgrade(engines: Engines, revision: str) -> str | None:
    """Take the tables back to an older revision ("base": none at all); the one they were at."""
    return _migrate(engines, command.downgrade, revision)


def _migrate(engines: Engines, step: Callable[[Config, str], None], revision: str) -> str | None:
    ping(engines)
    # One transaction for all: a migration that fails leaves the tables as they were. On SQLite its BEGIN IMMEDIATE
    # is the lock as well.
    with engines.writer.begin() as connection:
        if not engines.is_sqlite:
            connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
            connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
        before = current_revision(connection)
        _check_not_newer(engines, before)
        step(config(connection), revision)
    return before


def config(connection: Connection | None = None) -> Config:
    """Alembic's configuration; with a connection, its migrations run on that."""
    settings = Config()
    settings.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    settings.set_main_option("path_separator", "os")
    settings.attributes["connection"] = connection
    return settings


def ensure(engines: Engines) -> None:
    """Make sure that the tables are those of this version.

    A SQLite file is migrated when it needs it: there is nobody else to do it. A shared database is not; its
    operator decides when. Raises SchemaOutdated with the remedy, DatabaseUnavailable; no connection is left open then.
    """
    try:
        _ensure(engines)
    except BaseException:
        engines.dispose()
        raise


def _ensure(engines: Engines) -> None:
    ping(engines)
    with engines.reader.connect() as connection:
        found = current_revision(connection)
    if found == SCHEMA_REVISION:
        return
    _check_not_newer(engines, found)
    if not engines.is_sqlite:
        raise SchemaOutdated(
            f"the database {engines.shown} is at revision {found or 'none'}, this version needs {SCHEMA_REVISION}; "
            "run: nightshift db upgrade"
        )
    upgrade(engines)


def _check_not_newer(engines: Engines, found: str | None) -> None:
    if found is not None and found > SCHEMA_REVISION:
        raise SchemaOutdated(
            f"the database {engines.shown} is at revision {found}, newer than this version's {SCHEMA_REVISION}; "
            "install a newer nightshift"
        )
