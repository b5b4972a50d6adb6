"""Connections: how each database is opened, and its clock. No statement of the queue is here; those are in `store`."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import URL, Engine
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from jobs.errors import DatabaseUnavailable, SettingsError
from jobs.models import Timestamp
from jobs.redaction import check_authority, shown_url

#: Seconds that a SQLite writer waits for another process's transaction before it gives up: longer than a backup or a
#: vacuum of a small database lasts, and shorter than a lease, so that a heartbeat that waited still comes in time.
BUSY_TIMEOUT_S = 20.0
#: A writer thread waits for this process's own writer connection; above the busy timeout, so that gives up first.
POOL_TIMEOUT_S = 30.0
#: On PostgreSQL it waits for one of a few connections: shorter than a lease less a beat, so that a heartbeat that got
#: none tries again in time.
POSTGRES_POOL_TIMEOUT_S = 10.0
#: libpq's. A server whose machine vanished closes no connection: by the system's own rules an answer would be waited
#: for from a quarter of an hour to hours. Seconds, but for the last: milliseconds.
_NOTICE_SILENCE = {"keepalives_idle": 10, "keepalives_interval": 3, "keepalives_count": 3, "tcp_user_timeout": 15_000}


class db_now(FunctionElement[Any]):
    """The database's own clock, plus `offset_s` seconds.

    Machines' clocks differ; leases and back-off compare only what the database itself wrote.
    """

    type = Timestamp()
    inherit_cache = True

    def __init__(self, offset_s: float = 0.0) -> None:
        super().__init__(sa.bindparam(None, float(offset_s), sa.Float(), unique=True))


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # The very text that SQLAlchemy writes for a DateTime (26 characters), so that text order is time order.
    offset = compiler.process(element.clauses, **kwargs)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', printf('%+.3f seconds', {offset})) || '000')"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: SQLCompiler, **kwargs: Any) -> str:
    # clock_timestamp(), not now(): a long transaction must not write a lease that is already old.
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kwargs)}))"


@dataclass(frozen=True, slots=True)
class Engines:
    """A writer and a reader of one database; on PostgreSQL they are the same engine."""

    writer: Engine
    reader: Engine

    @property
    def is_sqlite(self) -> bool:
        return self.writer.dialect.name == "sqlite"

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return shown_url(self.writer.url.render_as_string(hide_password=True))

    def dispose(self) -> None:
        """Close every pooled connection."""
        self.writer.dispose()
        self.reader.dispose()


def parse_url(database_url: str) -> URL:
    """The URL with the driver that we use. Raises SettingsError for a database that we do not know."""
    try:
        if not database_url.startswith("sqlite"):  # whose path may have an @
            check_authority(database_url)
        url = sa.make_url(database_url)
    except sa.exc.ArgumentError:
        raise SettingsError(
            "NIGHTSHIFT_DATABASE_URL is no database URL; write sqlite:////dir/nightshift.db "
            "or postgresql://user:password@host/name"
        ) from None
    except ValueError as error:
        raise SettingsError(f"NIGHTSHIFT_DATABASE_URL {error}") from None
    if any("password" in name for name in url.query):  # where libraries show it
        raise SettingsError(
            "NIGHTSHIFT_DATABASE_URL has a password in its query; write it before the host: //user:password@host"
        )
    backend = url.drivername.partition("+")[0]
    if backend == "postgres" or url.drivername == "postgresql":
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise SettingsError(
            f"NIGHTSHIFT_DATABASE_URL names {url.drivername!r}; known are sqlite:/// and postgresql:// (psycopg)"
        )
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise SettingsError(
            "NIGHTSHIFT_DATABASE_URL names a SQLite database in memory, which no worker could see; "
            "name a file: sqlite:////dir/nightshift.db"
        )
    return url


def open_engines(database_url: str) -> Engines:
    """Engines for this URL; nothing is connected yet. Raises SettingsError."""
    url = parse_url(database_url)
    if url.get_backend_name() == "sqlite":
        return _sqlite_engines(url)
    try:
        engine = sa.create_engine(
            url,
            pool_pre_ping=True,
            pool_timeout=POSTGRES_POOL_TIMEOUT_S,
            hide_parameters=True,
            connect_args={
                "connect_timeout": 5,
                "options": "-c statement_timeout=15s -c lock_timeout=10s -c idle_in_transaction_session_timeout=10s",
                **_NOTICE_SILENCE,
            },
        )
    except ModuleNotFoundError:
        raise SettingsError(
            "NIGHTSHIFT_DATABASE_URL names PostgreSQL, whose driver is missing: pip install 'nightshift[postgres]'"
        ) from None
    _teach_types(engine.dialect.dbapi)
    return Engines(engine, engine)


def _teach_types(psycopg: Any) -> None:
    """psycopg knows most types by name until the first value comes; then it puts the class in the name's place, in two
    steps, and a thread that asks between them is told "cannot adapt type 'UUID'". So all come first, from here."""
    for known in (UUID, datetime):
        psycopg.adapters.get_dumper(known, psycopg.adapt.PyFormat.AUTO)


def _sqlite_engines(url: URL) -> Engines:
    folder = Path(str(url.database)).parent
    if not folder.is_dir():
        raise SettingsError(f"NIGHTSHIFT_DATABASE_URL names a file in {folder}, which is no folder; make it first")
    _make_private(Path(str(url.database)))
    # One writer connection: threads queue for it here, in fair order, and not in SQLite's busy loop.
    writer = sa.create_engine(
        url,
        pool_size=1,
        max_overflow=0,
        hide_parameters=True,  # an error's text goes to logs, and the parameters of an INSERT are prompts
        pool_timeout=POOL_TIMEOUT_S,
        connect_args={"timeout": BUSY_TIMEOUT_S},
    )
    reader = sa.create_engine(url, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_S})
    sa.event.listen(writer, "connect", _set_up_sqlite)
    sa.event.listen(reader, "connect", _set_up_sqlite)
    # IMMEDIATE takes the write lock at once. A transaction that reads first and upgrades later fails with
    # "database is locked" whatever the busy timeout says.
    sa.event.listen(writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    sa.event.listen(reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return Engines(writer, reader)


def _make_private(file: Path) -> None:
    """Make a new database its owner's alone; SQLite would make it as readable as other files. The -wal and -shm beside
    it take its mode. One that is there keeps what its owner chose."""
    with contextlib.suppress(OSError):  # of a read-only folder SQLite itself tells
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; the "begin" events do
    _use_wal(connection)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead logging, so that readers and the writer do not wait for each other.

    The switch needs the file for itself and does not honour the busy timeout; when several processes open a
    fresh file at once, all but one are told "locked" and try again.
    """
    pause = threading.Event()
    why = ""
    for _ in range(200):
        try:
            if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal":
                return
        except sqlite3.OperationalError as error:
            why = f": {error}"  # a full disk, a file or folder that cannot be written
        pause.wait(random.uniform(0.01, 0.05))
    raise sqlite3.OperationalError(f"the database file cannot be switched to write-ahead logging{why}")


def ping(engines: Engines) -> None:
    """Raises DatabaseUnavailable, in one sentence, when the database does not answer."""
    try:
        with engines.reader.connect() as connection:
            connection.execute(sa.select(1))
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0] if error.orig else "no reason given"
        raise DatabaseUnavailable(f"the database {engines.shown} does not answer: {reason}") from None
