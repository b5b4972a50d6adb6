"""The two lanes of a night, each a fresh place in a moment: migrated tables are copied, servers are shared."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import boto3
import psycopg
import pytest
import redis

from jobs import Settings, schema
from jobs.store import Store
from tests.faults.zygote import Zygote
from tests.servers import S3Server

LANES = ("embedded", "production")
BUCKET = "nights"


@dataclass(frozen=True, slots=True)
class Place:
    """A fresh night's settings, and what forks its processes. `aws`: boto3's variables, of this process too."""

    lane: str
    settings: Settings
    zygote: Zygote

    @property
    def aws(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


def migrated_file(folder: Path) -> Path:
    """An empty SQLite database with its tables."""
    path = folder / "migrated.db"
    with closing(Store.open(f"sqlite:///{path}")) as store:
        schema.upgrade(store.engines)
    # One file without its journals can be copied.
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def migrated_database(server_url: str) -> str:
    """The name of an empty PostgreSQL database with its tables, to be copied."""
    name = f"migrated_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    with closing(Store.open(server_url.rpartition("/")[0] + f"/{name}")) as store:
        schema.upgrade(store.engines)
    return name


def embedded(folder: Path, migrated: Path) -> Settings:
    """SQLite, a directory, and no broker but the worker's own."""
    settings = Settings(home=folder / "home")
    settings.make_home()
    shutil.copy(migrated, settings.home / "nightshift.db")
    return settings


@contextlib.contextmanager
def production(folder: Path, postgres: str, migrated: str, redis_url: str) -> Iterator[Settings]:
    """PostgreSQL, Redis and S3; the bucket is shared, its prefix is not."""
    name = f"night_{uuid.uuid4().hex}"
    with redis.Redis.from_url(redis_url) as broker:
        broker.flushall()
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {migrated}".encode())
        yield Settings(
            home=folder / "home",
            database_url=postgres.rpartition("/")[0] + f"/{name}",
            broker_url=redis_url,
            storage_url=f"s3://{BUCKET}/{name.replace('_', '-')}",
        )
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def make_bucket(server: S3Server) -> None:
    """The bucket that all nights of this server share."""
    environment = server.environment
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    )
    with closing(client):
        client.create_bucket(Bucket=BUCKET)


def only(*names: str) -> pytest.MarkDecorator:
    """Run a row on these lanes alone."""
    return pytest.mark.parametrize("lane", names, indirect=True)
