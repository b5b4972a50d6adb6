"""Stores on real databases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from jobs import schema
from jobs.db import db_now
from jobs.models import job
from jobs.store import Store


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'jobs.db'}"


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh database without tables, of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """A store on a fresh database of each kind."""
    opened = Store.open(database_url)
    schema.upgrade(opened.engines)
    yield opened
    opened.close()


@pytest.fixture
def sqlite_store(sqlite_url: str) -> Iterator[Store]:
    """A store on a fresh SQLite file."""
    opened = Store.open(sqlite_url)
    schema.upgrade(opened.engines)
    yield opened
    opened.close()


@pytest.fixture
def end_waiting(store: Store) -> Callable[[], None]:
    """Lets the back-off of every job be over, without waiting for it."""
    return lambda: make_available(store)


def make_available(store: Store) -> None:
    with store.engines.writer.begin() as connection:
        connection.execute(sa.update(job).values(available_at=db_now()))
