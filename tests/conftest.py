"""Fixtures for every test: real servers, and an environment without the machine's own settings."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import boto3
import pytest
import redis

from jobs.settings import Settings
from tests import servers

#: Its options must be known before `tests/faults` is looked at.
pytest_plugins = ["tests.faults.plugin"]

Address = TypeVar("Address")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads or writes the data of whoever runs it."""
    for name in [name for name in os.environ if name.startswith(("NIGHTSHIFT_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path / "home"))


@contextlib.contextmanager
def _started(server: contextlib.AbstractContextManager[Address]) -> Iterator[Address]:
    """The server; without its binary the test is skipped, in CI it fails."""
    try:
        address = server.__enter__()
    except servers.MissingServer as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    try:
        yield address
    finally:
        server.__exit__(None, None, None)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    with _started(servers.redis_server()) as url:
        yield url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    with _started(servers.postgres_server()) as url:
        yield url


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[servers.S3Server]:
    with _started(servers.rclone_s3()) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[servers.S3Server]:
    with _started(servers.moto_s3()) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """An empty Redis, shared by the tests one after the other."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A fresh, empty PostgreSQL database (no tables)."""
    with servers.fresh_database(postgres_server) as url:
        yield url


@dataclass(frozen=True, slots=True)
class Bucket:
    """A fresh bucket; `url` is what NIGHTSHIFT_STORAGE_URL takes, boto3's environment is set for it."""

    endpoint: str
    bucket: str
    url: str


def make_bucket(server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    with contextlib.closing(boto3.client("s3")) as client:
        client.create_bucket(Bucket=bucket)
    return Bucket(server.endpoint, bucket, f"s3://{bucket}/nightshift")


@pytest.fixture
def s3(rclone_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of a real S3 server (rclone)."""
    return make_bucket(rclone_server, monkeypatch)


@pytest.fixture
def moto_bucket(moto_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket of the second S3 server (moto)."""
    return make_bucket(moto_server, monkeypatch)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The embedded default, in a folder of its own."""
    return Settings(home=tmp_path / "nightshift")
