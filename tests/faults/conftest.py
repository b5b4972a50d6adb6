"""A night for every row: on both lanes unless the row says otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import lanes, zygote
from tests.faults.harness import Night
from tests.faults.lanes import Place
from tests.servers import S3Server


@pytest.fixture(scope="session")
def the_zygote() -> Iterator[zygote.Zygote]:
    with zygote.running() as running:
        yield running


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lanes.migrated_file(tmp_path_factory.mktemp("migrated"))


@pytest.fixture(scope="session")
def migrated_database(postgres_server: str) -> str:
    return lanes.migrated_database(postgres_server)


@pytest.fixture(scope="session")
def bucket_server(rclone_server: S3Server) -> S3Server:
    zygote.read_once()
    lanes.make_bucket(rclone_server)
    return rclone_server


@pytest.fixture(params=lanes.LANES)
def lane(request: pytest.FixtureRequest) -> str:
    """`lanes.only` runs a row on one of them alone."""
    return str(request.param)


@pytest.fixture
def place(
    lane: str,
    the_zygote: zygote.Zygote,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Place]:
    """A fresh database, broker and storage of the lane."""
    if lane == "embedded":
        yield Place(lane, lanes.embedded(tmp_path, request.getfixturevalue("migrated_file")), the_zygote)
        return
    server: S3Server = request.getfixturevalue("bucket_server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    postgres, migrated = request.getfixturevalue("postgres_server"), request.getfixturevalue("migrated_database")
    with lanes.production(tmp_path, postgres, migrated, request.getfixturevalue("redis_server")) as settings:
        yield Place(lane, settings, the_zygote)


@pytest.fixture
def night(place: Place, seed: int, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Night]:
    """A night of this seed. The seed is printed with every failure; `--seed N` repeats it."""
    print(f"seed {seed}, lane {place.lane}")
    with Night(place, seed, tmp_path, acks_late=bool(pytestconfig.getoption("--acks-late"))) as begun:
        yield begun
