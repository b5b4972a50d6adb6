"""Many workers that sweep and ring at once, and a backlog that nobody may pour into the broker: rows 43 and 50.

There is no leader: every worker sweeps and rings, each by one idempotent statement.
"""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar
from uuid import UUID

import pytest
import sqlalchemy as sa

from jobs import State
from jobs.db import db_now
from jobs.models import job as job_table
from jobs.spec import JobSpec
from jobs.store import Store
from tests.faults.brokers import BELLS, again_and_again, depth, look, pauses, unacked
from tests.faults.checker import check, held
from tests.faults.harness import SLACK_S, Guardian, Night
from worker.exit_codes import UNAVAILABLE

PRODUCTION = pytest.mark.parametrize("lane", ["production"], indirect=True)
SWEEPERS = 3
T = TypeVar("T")


def at_once(night: Night, work: Callable[[Store], T], count: int = SWEEPERS) -> list[T]:
    """`work` in so many threads that begin together, each with its own connections."""
    barrier = Barrier(count)

    def one(store: Store) -> T:
        barrier.wait()
        return work(store)

    stores = [Store.open(night.settings.database_url) for _ in range(count)]
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, stores))
    finally:
        for store in stores:
            store.close()


@pytest.mark.fault_slice
def test_row_43_an_expired_lease_is_taken_back_by_one_of_many_sweepers(night: Night) -> None:
    """3 sweepers at once, many expired leases"""
    jobs = night.submit(60)
    chosen = night.rng.sample([job.id for job in jobs], night.rng.randrange(20, 60))
    claims = [night.store.claim(id, "worker that died") for id in chosen]
    assert None not in claims
    with night.store.engines.writer.begin() as connection:
        connection.execute(sa.update(job_table).where(job_table.c.id.in_(chosen)).values(lease_expires_at=db_now(-1.0)))
    swept = at_once(night, Store.sweep)
    assert sum(each.requeued for each in swept) == len(chosen)
    assert [each.failed + each.cancelled for each in swept] == [0] * SWEEPERS
    found = {view.id: view for view in night.store.jobs()}
    assert {(found[id].state, found[id].attempts) for id in chosen} == {(State.queued, 0)}


@pytest.mark.fault_slice
def test_row_43_nobody_rings_for_a_row_that_another_has_just_rung_for(night: Night) -> None:
    """3 ringers at once, many rows whose bell is old"""
    jobs = night.store.submit([JobSpec(prompt="x")] * 100)
    limit = night.rng.randrange(5, 40)

    def ring(store: Store) -> list[UUID]:
        return [due.id for _ in range(6) for due in store.due(limit, older_than_s=60.0)]

    rung = Counter(id for ids in at_once(night, ring) for id in ids)
    # Who meets rows that another has just locked passes them over; they are there for the next round.
    rung.update(due.id for due in night.store.due(len(jobs), older_than_s=60.0))
    assert rung == Counter(job.id for job in jobs)


def test_row_43_jobs_of_a_killed_worker_are_handled_once_by_the_others(night: Night) -> None:
    """A worker that sweeps is killed among three"""
    # A lease that a busy machine outlasts, and short enough to wait for its end.
    workers = [night.worker(**{**BELLS, "lease_s": 8.0}).ready() for _ in range(SWEEPERS)]
    night.submit(30, steps=night.rng.randrange(300, 500))
    night.wait_running(12)
    victim = night.rng.choice([worker for worker in workers if worker.holds()])
    victim.kill(signal.SIGKILL)
    victim.wait()
    lost = victim.holds()
    back_s = victim.back_within_s()
    night.wait_until(lambda: not victim.holds(), "the end of its leases", back_s)
    night.wait_ended()
    print(check(night, duplicates=len(lost), orphans=len(lost), broker=True))
    assert sum(map(int, re.findall(r"expired leases: (\d+) jobs", night.log_text()))) == len(lost), (
        "each expired lease was handled by one sweeper"
    )
    for worker in night.alive():
        worker.stop()


def insert_backlog(night: Night, count: int) -> None:
    """So many queued jobs, as a night's submits left them an hour ago with no worker there."""
    night.submit(1, steps=2)  # the pattern of all
    columns = ", ".join(column.name for column in job_table.c if column.name not in ("id", "rung_at"))
    statement = (
        f"INSERT INTO job (id, rung_at, {columns}) "
        f"SELECT gen_random_uuid(), now() - interval '1 hour', {columns} FROM job, generate_series(1, {count - 1})"
    )
    with night.store.engines.writer.begin() as connection:
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))  # an hour's rows, not a submit's
        connection.execute(sa.text(statement))
    with night.store.engines.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE job"))


def rows_read_one_by_one(night: Night) -> int:
    """Rows of the job table that were read without an index since the database was made."""
    statement = "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'job'"
    with night.store.engines.reader.connect() as connection:
        connection.execute(sa.text("SELECT pg_stat_clear_snapshot()"))
        return int(connection.scalar(sa.text(statement)) or 0)


@PRODUCTION
@pytest.mark.parametrize("workers", [1, 3])
def test_row_50_a_backlog_stays_in_the_database(night: Night, workers: int) -> None:
    """A large backlog, no worker for long, then some"""
    rows = 100_000 if night.seed == 2 else 5_000
    insert_backlog(night, rows)
    concurrency, worst = 8, [0, 0]
    with look(night.settings.broker_url) as client:
        client.flushall()

        def measure() -> None:
            worst[:] = max(worst[0], depth(client)), max(worst[1], unacked(client))

        # One that looks for its means while the machine still writes the backlog may leave and be started again.
        with Guardian(night, workers, **BELLS) as guardian, again_and_again(measure, pauses(night, 0.005, 0.02)):
            # By the tally: what the test itself asks the database would be counted too.
            night.wait_until(lambda: len(night.entries("drawn")) > 20 * workers, "some work")
            before, began_s = rows_read_one_by_one(night), time.monotonic()
            night.wait_until(lambda: len(night.entries("drawn")) > 80 * workers, "more work")
            read, took_s = rows_read_one_by_one(night) - before, time.monotonic() - began_s
            urgent = night.client.submit("urgent", priority=9, steps=2)
            assert night.client.wait(urgent.id, SLACK_S).state is State.succeeded, "a fresh bell waits for no backlog"
        print(f"{rows} rows wait, {worst[0]} bells, {worst[1]} unacked, {read} rows read one by one in {took_s:.1f} s")
        # Each ringer rings for its free slots less what waits already; all may look at the same moment.
        assert worst[0] <= workers * concurrency + 1
        assert worst[1] <= 2 * workers * concurrency + 1
        assert rows < 100_000 or read < rows, "no round of anybody looks at each row"
        assert set(guardian.deaths) <= {UNAVAILABLE}
        for worker in guardian.workers:
            worker.stop()
        assert not list(held(night))
