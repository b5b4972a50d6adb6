"""The producer's checks of `nightshift doctor`: settings, database, broker, storage, and whether the queue moves."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import sqlalchemy as sa
from kombu import Connection as Broker

from jobs import schema, store_health
from jobs.bell import transport_options
from jobs.checks import Finding, Mark, above_floor, looked
from jobs.db import Engines, open_engines, ping
from jobs.models import SCHEMA_REVISION
from jobs.probe import check_storage, storage_now
from jobs.redaction import hide, shown_url
from jobs.settings import Settings
from jobs.storage import open_storage

#: Versions below these have known holes or lose messages.
FLOORS = {"celery": (5, 7), "kombu": (5, 7), "pillow": (12, 3)}
CLOCK_S = 5.0
#: A queue whose oldest job waits longer, and a lease that is expired for longer, are worth a look.
WAITS_S, EXPIRED_S = 600.0, 60.0
FREE_BYTES = 1_000_000_000


def checks(settings: Settings) -> Iterator[Finding]:
    """All that a machine without torch can look at."""
    yield Finding("settings", Mark.ok, _places(settings))
    for package, floor in FLOORS.items():
        yield above_floor(package, floor)
    yield from looked("database", partial(_database, settings), "start it, or set NIGHTSHIFT_DATABASE_URL")
    yield from _broker(settings.broker_url)
    yield from looked(
        "storage", partial(_storage, settings), "start it, set NIGHTSHIFT_STORAGE_URL, or see to its permissions"
    )


def _places(settings: Settings) -> str:
    urls = settings.database_url, settings.broker_url, settings.storage_url
    return "database {}, broker {}, storage {}".format(*map(shown_url, urls))


# The database


def _database(settings: Settings) -> Iterator[Finding]:
    file = _file_of(settings.database_url)
    if file is not None and not file.exists():
        yield _to_be_made("database", file)
        return
    engines = open_engines(settings.database_url)
    try:
        ping(engines)
        with engines.reader.connect() as connection:
            kind = engines.reader.dialect
            version = ".".join(map(str, kind.server_version_info or ()))
            yield Finding("database", Mark.ok, f"{engines.shown} answers ({kind.name} {version})".replace(" )", ")"))
            found = schema.current_revision(connection)
        if file is not None:
            yield from looked("database file", partial(_sqlite, engines, file), "restore it from a backup")
        yield _migrations(found, upgraded_by_itself=file is not None)
        if found == SCHEMA_REVISION:
            yield from _queue(engines)
    finally:
        engines.dispose()


def _file_of(database_url: str) -> Path | None:
    url = sa.make_url(database_url)
    return Path(str(url.database)) if url.get_backend_name() == "sqlite" else None


def _migrations(found: str | None, *, upgraded_by_itself: bool) -> Finding:
    if found == SCHEMA_REVISION:
        return Finding("migrations", Mark.ok, f"the tables are at revision {found}")
    seen = f"the tables are at revision {found or 'none'}, this version needs {SCHEMA_REVISION}"
    if found is not None and found > SCHEMA_REVISION:
        return Finding("migrations", Mark.failed, seen, "install a newer nightshift")
    if upgraded_by_itself:
        return Finding(
            "migrations", Mark.warning, seen, "the next submit or worker does that, or: nightshift db upgrade"
        )
    return Finding("migrations", Mark.failed, seen, "nightshift db upgrade")


def _sqlite(engines: Engines, file: Path) -> Iterator[Finding]:
    with engines.reader.connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        sound = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if sound == "ok" and mode == "wal":
        yield Finding("database file", Mark.ok, "sound, with write-ahead logging")
    elif sound == "ok":
        yield Finding("database file", Mark.warning, f"its journal is {mode}, not WAL", "put it on a local disk")
    else:
        yield Finding("database file", Mark.failed, f"it is damaged: {sound}", "restore it from a backup")
    yield _free("database disk", file.parent)


def _to_be_made(check: str, place: Path) -> Finding:
    above = next(folder for folder in place.absolute().parents if folder.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return Finding(check, Mark.skipped, f"{place} is not there yet", "the first submit or worker makes it")
    remedy = "see to its permissions, or set NIGHTSHIFT_HOME to a folder that can be made"
    return Finding(check, Mark.failed, f"{place} is not there, and nothing can be made in {above}", remedy)


def _free(check: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    seen = f"{free / 1e9:.1f} GB free at {folder}"
    if free >= FREE_BYTES:
        return Finding(check, Mark.ok, seen)
    return Finding(check, Mark.warning, seen, "make room: nightshift prune, or move NIGHTSHIFT_HOME")


def _queue(engines: Engines) -> Iterator[Finding]:
    with engines.reader.connect() as connection:
        before = datetime.now(UTC)
        now = store_health.now(connection)
        apart = now - before - (datetime.now(UTC) - before) / 2
        waiting = store_health.waiting(connection)
        expired = store_health.expired(connection, EXPIRED_S)
    yield _clock("database clock", apart)
    if expired:
        seen = f"{expired} jobs are held by workers that stopped answering, and nobody takes them back"
        yield Finding("leases", Mark.warning, seen, "start a worker: nightshift worker")
    stuck = [each for each in waiting if (now - each.since).total_seconds() > WAITS_S]
    for each in stuck:
        yield _stuck(each, now)
    if not stuck:
        yield Finding("queue", Mark.ok, f"{sum(each.jobs for each in waiting)} jobs wait, none for long")


def _stuck(waiting: store_health.Waiting, now: datetime) -> Finding:
    minutes = int((now - waiting.since).total_seconds() // 60)
    seen = f"{waiting.jobs} jobs wait for the model {waiting.model}, the oldest for {minutes} minutes"
    asked = waiting.claimed is not None and (now - waiting.claimed).total_seconds() <= WAITS_S
    if asked:
        return Finding("queue", Mark.ok, f"{seen}; workers are at it")
    last = "never" if waiting.claimed is None else f"last at {waiting.claimed:%Y-%m-%d %H:%M} UTC"
    remedy = "start a worker that serves it (NIGHTSHIFT_MODELS), see: nightshift status --state queued"
    return Finding("queue", Mark.warning, f"{seen}, and no worker took one ({last})", remedy)


def _clock(check: str, apart: timedelta) -> Finding:
    seconds = apart.total_seconds()
    seen = f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    if abs(seconds) <= CLOCK_S:
        return Finding(check, Mark.ok, seen)
    return Finding(check, Mark.warning, seen, "let both machines set their clocks by NTP")


# The broker


def _broker(url: str) -> Iterator[Finding]:
    if url.startswith("memory:"):
        yield Finding("broker", Mark.skipped, "memory:// lives inside the worker, which looks for jobs by itself")
        return
    for one in url.split(";"):
        remedy = "start it, or set NIGHTSHIFT_BROKER_URL; meanwhile workers find jobs by looking, every few seconds"
        try:
            yield from _redis(one)
        except Exception as error:  # redis', kombu's and the socket's own kinds; a ValueError for a bad option
            yield Finding("broker", Mark.failed, f"{shown_url(one)} does not answer: {hide(str(error))}", remedy)
        yield broker_access(one)


def _redis(url: str) -> Iterator[Finding]:
    options = {**transport_options(url), "socket_timeout": 5}
    with Broker(url, connect_timeout=5, transport_options=options) as connection:
        channel: Any = connection.default_channel  # with the very options that producer and worker take
        client = channel.client
        client.ping()
        yield Finding("broker", Mark.ok, f"{shown_url(url)} answers (redis {client.info('server')['redis_version']})")
        policy = None
        with contextlib.suppress(Exception):  # CONFIG is forbidden to most users of a shared server
            policy = client.config_get("maxmemory-policy").get("maxmemory-policy")
    if policy is None:
        yield Finding("broker memory", Mark.skipped, "the server does not tell its maxmemory-policy")
    elif policy == "noeviction":
        yield Finding("broker memory", Mark.ok, "maxmemory-policy noeviction")
    else:
        remedy = "set maxmemory-policy noeviction: a full server would drop bells"
        yield Finding("broker memory", Mark.warning, f"maxmemory-policy {policy}", remedy)


def broker_access(url: str) -> Finding:
    """Whether strangers could ring, or listen: no password or no TLS on a way that leaves this machine."""
    parts = urlsplit(url)
    if _is_loopback(parts.hostname or "localhost"):
        return Finding("broker access", Mark.ok, "on this machine alone, as far as its address tells")
    missing = [] if parts.password else ["a password"]
    asked = dict(parse_qsl(parts.query)).get("ssl_cert_reqs", "required").lower()
    checked = asked in ("required", "cert_required")
    missing += ["TLS"] if parts.scheme != "rediss" else [] if checked else ["a check of the server's certificate"]
    if not missing:
        return Finding("broker access", Mark.ok, "with a password and TLS")
    remedy = "write rediss://:password@host:6379/0, and let no stranger reach the port"
    return Finding("broker access", Mark.warning, f"off this machine without {' and without '.join(missing)}", remedy)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# The storage


def _storage(settings: Settings) -> Iterator[Finding]:
    folder = _folder_of(settings.storage_url)
    if folder is not None and not folder.exists() and "storage_url" not in settings.model_fields_set:
        yield _to_be_made("storage", folder)
        return
    storage = open_storage(settings.storage_url)
    check_storage(storage)
    yield Finding("storage", Mark.ok, f"{shown_url(settings.storage_url)} writes, reads, lists and deletes")
    yield _clock("storage clock", storage_now(storage) - datetime.now(UTC))
    yield _public(storage.public())
    if folder is not None:
        yield _free("storage disk", folder)


def _folder_of(storage_url: str) -> Path | None:
    parts = urlsplit(storage_url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _public(public: bool | None) -> Finding:
    match public:
        case None:
            return Finding("storage access", Mark.skipped, "not known: the server does not say who may read")
        case True:
            remedy = "block public access to the bucket, or take the folder's permissions from others"
            return Finding("storage access", Mark.warning, "strangers can read the pictures", remedy)
        case False:
            return Finding("storage access", Mark.ok, "no stranger can read the pictures, as far as the server says")
