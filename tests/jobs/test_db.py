"""How the databases are opened."""

import contextlib
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import db

ASK = """
import psycopg
from jobs.db import open_engines

ours = {"uuid.UUID", "datetime.datetime"}
named = lambda adapters: ours & adapters._dumpers[psycopg.adapt.PyFormat.AUTO].keys()
assert named(psycopg.adapters) == ours, "psycopg has another way now"
engines = open_engines("postgresql://host/name")
assert not named(engines.writer.dialect._psycopg_adapters_map)
"""


def test_no_thread_ever_meets_a_driver_that_is_about_to_learn_our_types() -> None:
    """In a process of its own: any test before this one may have taught it."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_file_that_cannot_be_written_is_told_in_the_databases_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nightshift.db"
    with contextlib.closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE a (b)")
    monkeypatch.setattr(random, "uniform", lambda least, most: 0.0)
    with (
        contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection,
        pytest.raises(sqlite3.OperationalError, match="write-ahead logging: attempt to write a readonly"),
    ):
        db._use_wal(connection)
