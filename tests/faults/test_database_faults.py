"""A database that cuts, forgets to answer, goes away or is locked while workers hold jobs: rows 23 to 27."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from jobs import Settings
from jobs.states import State
from tests.faults import lanes, zygote
from tests.faults.callers import notes
from tests.faults.checker import check
from tests.faults.harness import Night, Worker
from tests.faults.lanes import Place, only
from tests.faults.proxy import TcpProxy
from tests.servers import Cluster, S3Server, postgres_cluster

#: By it a terminator knows the workers' connections from the test's own.
NAME = "night-worker"
#: A lease is long here beside a beat, so that an outage can be shorter or longer than it.
LEASES = {"lease_s": 3.0, "beat_s": 0.5}
#: None runs out here, however busy the machine is: what is drawn again is drawn because of the fault.
LONG_LEASES = {"lease_s": 10.0, "beat_s": 0.5}
LOST = (
    "after_finish_commit:raise@p=0.1",
    "after_finish_commit:raise@p=0.6",
    "before_finish_commit:raise@p=0.3",
    "before_claim_commit:raise@p=0.2",
    "after_claim_commit:raise@p=0.3",
    "heartbeat:raise@p=0.5",
)


@contextmanager
def terminating(night: Night, every_s: float) -> Iterator[list[int]]:
    """Cut half of the workers' connections to PostgreSQL again and again; the list says how many each time."""
    stopped, cut = threading.Event(), list[int]()
    server_url, _, database = night.settings.database_url.rpartition("/")
    mine = "FROM pg_stat_activity WHERE application_name = %s AND datname = %s AND random() < 0.5"

    def run() -> None:
        with psycopg.connect(f"{server_url}/postgres", autocommit=True) as connection:
            while not stopped.wait(every_s):
                found = connection.execute(f"SELECT pg_terminate_backend(pid) {mine}".encode(), (NAME, database))
                cut.append(len(found.fetchall()))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield cut
    finally:
        stopped.set()
        thread.join()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL of the test's own, to be stopped."""
    with postgres_cluster() as cluster:
        yield cluster


@pytest.fixture
def breakable(
    cluster: Cluster,
    the_zygote: zygote.Zygote,
    redis_url: str,
    bucket_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> Iterator[Night]:
    """A night on the production lane whose database is `cluster`."""
    for name, value in bucket_server.environment.items():
        monkeypatch.setenv(name, value)
    migrated = lanes.migrated_database(cluster.url)
    settings = Settings(
        home=tmp_path / "home",
        database_url=cluster.url.rpartition("/")[0] + f"/{migrated}",
        broker_url=redis_url,
        storage_url=f"s3://{lanes.BUCKET}/{migrated.replace('_', '-')}",
    )
    place = Place("production", settings, the_zygote)
    with Night(place, seed, tmp_path, acks_late=bool(pytestconfig.getoption("--acks-late"))) as begun:
        yield begun


def stop_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.stop()


@only("production")
def test_row_23_cut_connections_lose_nothing_and_show_nothing_twice(night: Night) -> None:
    """PostgreSQL connections cut during claim, renew and commit"""
    workers = [night.worker(step_s=0.01, environment={"PGAPPNAME": NAME}, **LEASES).ready() for _ in range(2)]
    night.submit(40, steps=30)
    with terminating(night, every_s=night.rng.uniform(0.05, 0.15)) as cut:
        night.wait_until(lambda: sum(cut) >= 40 or night.all_ended(), "cut connections")
    night.wait_ended()
    assert sum(cut) >= 5
    stop_all(workers)
    # A claim or a finish whose answer was cut off waits for its lease, and is drawn once more at most.
    print(check(night, duplicates=16, orphans=16))


def test_row_24_a_commit_whose_answer_is_lost_is_not_drawn_again(night: Night) -> None:
    """the answer to a commit is lost (and: the commit itself)"""
    failpoint = night.turn(LOST)
    print(failpoint)
    night.submit(40)
    workers = [night.worker(failpoint=f"{failpoint},seed={night.seed + n}", **LONG_LEASES).ready() for n in range(2)]
    night.wait_ended()
    # A commit that fails five times in a row is no commit: then the picture is drawn again. Some nights have such luck.
    uncommitted = night.log_text().count("did not say whether it is finished") if "before_finish" in failpoint else 0
    assert uncommitted <= 3
    print(check(night, duplicates=uncommitted, orphans=uncommitted, broker=True))
    stop_all(workers)


@pytest.mark.fault_slice
def test_row_25_a_short_outage_of_the_database_draws_nothing_again(breakable: Night, cluster: Cluster) -> None:
    """PostgreSQL stopped at once and back within the lease"""
    night = breakable
    # The longest: for longer than a statement is tried again on its own.
    lease_s = night.turn((4.0, 6.0, 15.0, 5.0))
    workers = [night.worker(step_s=0.02, lease_s=lease_s, beat_s=lease_s / 6).ready() for _ in range(2)]
    night.submit(30, steps=night.rng.randint(10, 40))
    night.wait_running(8)
    time.sleep(night.rng.uniform(0.0, 0.5))
    stopped_s = time.monotonic()
    cluster.stop(immediate=True)
    time.sleep(0.4 * lease_s)
    cluster.start()
    back_s = time.monotonic()
    night.wait_ended()
    stop_all(workers)
    assert any(stopped_s < entry.at_s < back_s for entry in night.entries("drawn")), "nobody drew meanwhile"
    print(check(night, duplicates=0))


def test_row_26_a_long_outage_makes_workers_let_go_and_nobody_pays(breakable: Night, cluster: Cluster) -> None:
    """PostgreSQL away for longer than the lease"""
    night = breakable
    workers = [night.worker(step_s=0.01, **LEASES).ready() for _ in range(2)]
    night.submit(30, steps=200)
    night.wait_running(8)
    held = {image.key for view in night.views().values() for image in view.images}
    cluster.stop(immediate=True)
    time.sleep(1.5 * LEASES["lease_s"])
    drawn_s = time.monotonic()
    fenced_s = drawn_s - 0.4 * LEASES["lease_s"]
    late = [entry for entry in night.entries("drawn") if fenced_s < entry.at_s < drawn_s]
    assert late == [], "a worker drew on although its leases were over"
    cluster.start()
    night.wait_ended()
    stop_all(workers)
    assert held == set()
    # A peer's sweeper and an empty worker may be quicker than the vouching for a job or two; all were held.
    suspects = sum(view.suspect for view in night.views().values())
    assert suspects <= 3, f"living workers did not vouch for {suspects} jobs"
    print(check(night, duplicates=16, orphans=16))


@only("production")
def test_row_26_a_database_that_falls_silent_makes_workers_let_go(night: Night) -> None:
    """PostgreSQL is a black hole for longer than the lease"""
    night.submit(30, steps=200)
    direct = night.settings.database_url
    with TcpProxy(sa.make_url(direct).port or 0) as proxy:
        behind = {"NIGHTSHIFT_DATABASE_URL": proxy.in_front(direct)}
        workers = [night.worker(step_s=0.01, environment=behind, **LEASES).ready() for _ in range(2)]
        night.wait_running(8)
        proxy.stall()
        time.sleep(1.5 * LEASES["lease_s"])
        drawn_s = time.monotonic()
        fenced_s = drawn_s - 0.4 * LEASES["lease_s"]
        late = [entry for entry in night.entries("drawn") if fenced_s < entry.at_s < drawn_s]
        assert late == [], "a worker drew on although its leases were over"
        proxy.pass_all()
        night.wait_ended()
        stop_all(workers)
    print(check(night, duplicates=32, orphans=32))


@only("embedded")
@pytest.mark.fault_slice
def test_row_27_a_locked_database_costs_no_lease(night: Night) -> None:
    """SQLite locked by another process for longer than a beat"""
    workers = [night.worker(step_s=0.02, **LONG_LEASES).ready() for _ in range(2)]
    night.submit(24, steps=40)
    night.wait_running(8)
    out, file = night.folder / "lock", str(night.store.engines.writer.url.database)
    holder = night.fork("call", function="hold_exclusive", arguments={"path": file, "seconds": 1.5, "out": str(out)})
    night.wait_until(lambda: len(notes(out)) == 2, "the end of the lock")
    assert holder.wait() == 0
    assert night.store.counts()[State.succeeded] < 24, "all was over before the lock"
    night.wait_ended()
    stop_all(workers)
    assert "database is locked" not in night.log_text()
    print(check(night, duplicates=0))
