"""Row 53: many faults in one night, drawn by a printed seed. `make soak MINUTES=30 JOBS=10000` for a long one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import report
from tests.faults import brokers, lanes
from tests.faults.brokers import OwnRedis
from tests.faults.checker import check, computed_again
from tests.faults.harness import Night
from tests.faults.s3_stub import FaultyS3, faulty_s3
from tests.faults.soak import soak

# Not NIGHTSHIFT_...: they are no settings of the product. Read now: the fixtures empty the environment.
MINUTES = float(os.environ.get("SOAK_MINUTES", "0.5"))
JOBS = int(os.environ.get("SOAK_JOBS", "200"))
#: Of a worker, while everything around it fails.
MAY_GROW_MB = 40.0
#: Executors start their threads one by one as they need them, so a young worker still gets more.
SETTLED_S = 120
REPORT = os.environ.get("SOAK_REPORT", "")


@pytest.fixture
def stub(seed: int, monkeypatch: pytest.MonkeyPatch, place: lanes.Place) -> Iterator[FaultyS3]:
    """The storage of this night's workers, instead of the lane's own."""
    with faulty_s3(seed) as server:
        for name, value in server.server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def broker() -> Iterator[OwnRedis]:
    with OwnRedis() as own:
        yield own


@lanes.only("production")
@pytest.mark.timeout(60 * MINUTES + 1800)
def test_row_53_a_night_of_many_faults_loses_nothing(stub: FaultyS3, broker: OwnRedis, night: Night) -> None:
    """a random mix of faults 1, 8, 12, 14, 15, 23, 24, 31, 37, 41"""
    brokers.move_to(night, broker.url)
    outcome = soak(night, broker, stub, seconds=60 * MINUTES, jobs=JOBS)
    again = computed_again(night)
    result = outcome.as_json(night, again)
    print(json.dumps(result, indent=2))
    if REPORT:
        report.write(Path(REPORT), result, beside=("celery", "kombu", "redis", "sqlalchemy", "psycopg"))
    allowed = outcome.chaos.duplicates(len(outcome.poison))
    assert check(
        night,
        failed=outcome.poison,
        either=outcome.chaos.cancelled,
        # A suspect whose worker is killed while it is alone looks guilty; it may so twice, and keeps its attempt.
        charged={view.id for view in night.ended.values() if view.solo_crashes and view.attempts == 1},
        duplicates=allowed,
        orphans=2 * allowed,
    )
    life = outcome.watch.longest().summary()
    if life["lasted_s"] >= SETTLED_S:
        assert life["threads_end"] <= life["threads_start"] + 2, life
    assert life["rss_mb_end"] <= life["rss_mb_start"] + MAY_GROW_MB, life
