"""Many threads, and many processes, at one database."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from uuid import UUID

import psycopg
import sqlalchemy as sa

from jobs import schema
from jobs.models import job
from jobs.spec import JobSpec
from jobs.states import State
from jobs.store import Store
from jobs.views import Sweep

SPEC = JobSpec(prompt="x")
Result = TypeVar("Result")


def at_once(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of these calls, all begun at the same moment in threads of their own."""
    gate = threading.Barrier(len(calls))

    def run(call: Callable[[], Result]) -> Result:
        gate.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_each_job_is_claimed_once(store: Store) -> None:
    ids = [view.id for view in store.submit([SPEC] * 60)]

    def claim_all(worker: str) -> list[UUID]:
        return [job_id for job_id in ids if store.claim(job_id, worker)]

    claimed = at_once([lambda name=f"worker-{n}": claim_all(name) for n in range(6)])  # type: ignore[misc]
    assert Counter(job_id for some in claimed for job_id in some) == Counter(ids)


def test_twenty_submits_with_one_key_make_one_job(store: Store) -> None:
    views = at_once([lambda: store.submit([SPEC], idempotency_keys=["k"])[0]] * 20)
    assert len({view.id for view in views}) == 1
    assert store.counts()[State.queued] == 1


def test_submits_of_the_same_keys_in_opposite_order_do_not_deadlock(store: Store) -> None:
    keys = [f"key-{n}" for n in range(200)]
    forward = lambda: store.submit([SPEC] * 200, idempotency_keys=keys)  # noqa: E731
    backward = lambda: store.submit([SPEC] * 200, idempotency_keys=keys[::-1])[::-1]  # noqa: E731
    results = at_once([forward, backward] * 3)
    assert len({tuple(view.id for view in views) for views in results}) == 1


def test_two_sweepers_put_each_lost_job_back_once(store: Store) -> None:
    for view in store.submit([SPEC] * 30):
        store.claim(view.id, "worker-1", lease_s=-1.0)
    swept = at_once([store.sweep] * 4)
    assert sum(sweep.requeued for sweep in swept) == 30
    assert store.sweep() == Sweep(0, 0, 0)


def test_two_sweepers_never_ring_for_the_same_job(store: Store) -> None:
    store.submit([SPEC] * 40)
    rung = at_once([lambda: store.due(10, older_than_s=60)] * 4)
    ids = [due.id for some in rung for due in some]
    assert len(ids) == len(set(ids)) <= 40


def test_a_transaction_that_reads_before_it_writes_waits_for_its_turn(sqlite_store: Store) -> None:
    """Begun without the write lock it would be told "database is locked" at its first write, whatever it waits."""
    (view,) = sqlite_store.submit([SPEC])
    stores = [Store.open(str(sqlite_store.engines.writer.url)) for _ in range(3)]  # each as in a process of its own
    count = sa.select(job.c.attempts).where(job.c.id == view.id)

    def add_one(store: Store) -> None:
        for _ in range(10):
            with store.engines.writer.begin() as connection:
                before = connection.scalars(count).one()
                connection.execute(sa.update(job).where(job.c.id == view.id).values(attempts=before + 1))

    at_once([partial(add_one, store) for store in stores])
    assert sqlite_store.get(view.id).attempts == 30
    for store in stores:
        store.close()


def test_processes_that_start_together_on_a_fresh_file_all_get_its_tables(sqlite_url: str) -> None:
    program = (
        "import sys; from jobs.store import Store; from jobs import schema; from jobs.spec import JobSpec\n"
        "store = Store.open(sys.argv[1]); sys.stdin.readline(); schema.ensure(store.engines)\n"
        "store.submit([JobSpec(prompt='x')])"
    )
    command = [sys.executable, "-c", program, sqlite_url]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(5)]
    for process in started:  # each waits for its line after the slow imports
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0] * 5, errors
    store = Store.open(sqlite_url)
    schema.ensure(store.engines)
    assert store.counts()[State.queued] == 5
    store.close()


def test_threads_that_upgrade_together_take_turns(database_url: str) -> None:
    stores = [Store.open(database_url) for _ in range(4)]
    at_once([lambda store=store: schema.upgrade(store.engines) for store in stores])  # type: ignore[misc]
    for store in stores:
        schema.ensure(store.engines)
        store.close()


def test_a_server_whose_machine_vanished_is_noticed_within_a_lease(postgres_url: str) -> None:
    """No packet tells of it; by the system's own rules a heartbeat would wait for hours, and its leases be lost."""
    store = Store.open(postgres_url)
    with store.engines.writer.connect() as connection:
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        with socket.socket(fileno=os.dup(driver.fileno())) as wire:
            names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            idle_s, every_s, times, unanswered_ms = (
                wire.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names
            )
            assert wire.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    store.close()
    assert max(idle_s + every_s * times, unanswered_ms / 1000) < 20
