"""The migrations, on both databases."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from jobs import schema
from jobs.db import open_engines
from jobs.errors import DatabaseUnavailable, SchemaOutdated
from jobs.models import SCHEMA_REVISION, metadata
from tests.servers import free_port


def tables(url: str) -> set[str]:
    engines = open_engines(url)
    found = set(sa.inspect(engines.writer).get_table_names())
    engines.dispose()
    return found


def test_autogenerate_has_nothing_to_add(database_url: str) -> None:
    engines = open_engines(database_url)
    schema.upgrade(engines)
    with engines.reader.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
    engines.dispose()


def test_up_down_and_up_again(database_url: str) -> None:
    engines = open_engines(database_url)
    assert schema.upgrade(engines) is None
    assert tables(database_url) == {"alembic_version", "batch", "image", "job"}
    assert schema.upgrade(engines) == SCHEMA_REVISION
    assert schema.downgrade(engines, "base") == SCHEMA_REVISION
    assert tables(database_url) == {"alembic_version"}
    schema.upgrade(engines)
    schema.ensure(engines)
    engines.dispose()


def test_the_tables_version_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(schema.config()).get_current_head() == SCHEMA_REVISION


def test_sqlite_is_migrated_when_it_needs_it(sqlite_url: str) -> None:
    engines = open_engines(sqlite_url)
    schema.ensure(engines)
    assert "job" in tables(sqlite_url)
    engines.dispose()


def test_postgres_without_tables_says_what_to_do(postgres_url: str) -> None:
    engines = open_engines(postgres_url)
    with pytest.raises(SchemaOutdated, match="run: nightshift db upgrade"):
        schema.ensure(engines)
    engines.dispose()


def test_tables_of_a_newer_version_are_left_alone(sqlite_url: str) -> None:
    engines = open_engines(sqlite_url)
    schema.upgrade(engines)
    with engines.writer.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaOutdated, match="install a newer nightshift"):
        schema.ensure(engines)
    with pytest.raises(SchemaOutdated, match="install a newer nightshift"):
        schema.upgrade(engines)
    engines.dispose()


def test_a_database_that_is_not_there_is_told_without_its_password() -> None:
    engines = open_engines(f"postgresql://me:geheim@127.0.0.1:{free_port()}/x")
    with pytest.raises(DatabaseUnavailable, match="does not answer") as caught:
        schema.ensure(engines)
    assert "geheim" not in str(caught.value)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"This is a shopping list, not a database." * 50)
    engines = open_engines(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(DatabaseUnavailable, match="not a database"):
        schema.ensure(engines)
    engines.dispose()


def test_the_migrations_are_found_beside_the_packages() -> None:
    assert (schema.migrations_folder() / "versions").is_dir()
