"""Our own code, broken on purpose: the suite that passes all the same proves nothing.

Each mutation takes one of the things away that hold the promise. `python -m tests.faults.mutate` runs the rows that
are meant to notice, and fails when none does.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa
from celery import Celery
from celery.exceptions import Reject
from sqlalchemy.engine import Connection

from jobs import store as store_module
from jobs import store_lease
from jobs.bell import TASK
from jobs.models import Timestamp, job
from jobs.states import State
from jobs.store import Store
from jobs.views import Claim, Sweep
from sd_engine import Engine, Finished
from worker import app as worker_app
from worker import process, tasks
from worker.sweeper import Ringer, Sweeper

Patches = Iterator[Any]


def no_fencing() -> Patches:
    """finish, fail and release look at the job alone, not at whose lease it is"""

    def held(claim: Claim) -> sa.ColumnElement[bool]:
        return sa.and_(job.c.id == claim.job_id, store_lease.is_in(State.running))

    yield patch.object(store_lease, "held", held)
    yield patch.object(store_module, "held", held)


def attempt_counted_late() -> Patches:
    """attempts are counted when one fails, not at the claim"""
    claim, fail, release, sweep = store_lease.claim, store_lease.fail, store_lease.release, store_lease.sweep

    def count(connection: Connection, where: sa.ColumnElement[bool], by: int) -> None:
        connection.execute(sa.update(job).where(where).values(attempts=job.c.attempts + by))

    def late_claim(connection: Connection, *args: Any, **options: Any) -> Claim | None:
        taken = claim(connection, *args, **options)
        if taken is not None:
            count(connection, store_lease.held(taken), -1)
        return taken

    def late_fail(connection: Connection, taken: Claim, *args: Any, **options: Any) -> Any:
        count(connection, store_lease.held(taken), 1)
        return fail(connection, taken, *args, **options)

    def late_release(connection: Connection, all_taken: Sequence[Claim], **options: Any) -> int:
        for taken in all_taken:
            count(connection, store_lease.held(taken), 1)
        return release(connection, all_taken, **options)

    def late_sweep(connection: Connection) -> Sweep:
        count(connection, store_lease._expired(), 1)
        return sweep(connection)

    yield patch.multiple(store_lease, claim=late_claim, fail=late_fail, release=late_release, sweep=late_sweep)


def crash_counted_late() -> Patches:
    """a crash alone is counted when the job ends, not at the claim: a process that dies counts nothing"""
    yield patch.object(store_lease, "_one_if_suspect", sa.literal(0))
    yield patch.object(store_lease, "_GIVE_BACK", {"attempts": job.c.attempts - 1})


def suspects_in_company() -> Patches:
    """a suspect is claimed beside others"""
    claim = Store.claim

    def anyhow(self: Store, *args: Any, alone: bool = False, **options: Any) -> Claim | None:
        return claim(self, *args, alone=True, **options)

    yield patch.object(Store, "claim", anyhow)


def no_vouching() -> Patches:
    """a worker that lost its lease and lives does not say so"""
    yield patch.object(Store, "vouch", lambda self, claim: False)


def cancel_overwritten() -> Patches:
    """finish, fail and release do not look whether the job is to be cancelled"""
    yield patch.object(store_lease, "cancel_wanted", sa.false())


def sweep_in_steps() -> Patches:
    """the sweep takes several statements, and rows change between them"""

    def sweep(connection: Connection) -> Sweep:
        wanted = sa.and_(store_lease._expired(), store_lease.cancel_wanted)
        cancelled = store_lease.end(connection, wanted, State.cancelled)
        with patch.object(store_lease, "cancel_wanted", sa.false()):
            swept = _sweep(connection)
        return Sweep(swept.requeued, swept.failed, cancelled)

    _sweep = store_lease.sweep
    yield patch.object(store_lease, "sweep", sweep)


def worker_clock() -> Patches:
    """leases are written and compared on the worker's clock, not on the database's"""

    def local_now(offset_s: float = 0.0) -> sa.ColumnElement[Any]:
        return sa.literal(datetime.fromtimestamp(time.time() + offset_s, UTC), Timestamp())

    yield patch.object(store_lease, "db_now", local_now)


def begin_deferred() -> Patches:
    """BEGIN instead of BEGIN IMMEDIATE"""
    execute = Connection.exec_driver_sql

    def deferred(self: Connection, statement: str, *args: Any, **options: Any) -> Any:
        return execute(self, statement.removesuffix(" IMMEDIATE"), *args, **options)

    yield patch.object(Connection, "exec_driver_sql", deferred)


def no_sweeper() -> Patches:
    """nobody takes expired leases back"""
    yield patch.object(Sweeper, "tick", lambda self: self._sweep_s)


def no_ringer() -> Patches:
    """nobody rings again for rows whose bell was lost"""
    yield patch.object(Ringer, "tick", lambda self: self._pace.idle_s)


def uncapped_ringer() -> Patches:
    """bells are rung for every row that waits, not for what is free"""

    def tick(self: Ringer) -> float:
        return self._pace.busy_s if self._ring_for_due(1_000_000) else self._pace.idle_s

    yield patch.object(Ringer, "tick", tick)


def early_ack() -> Patches:
    """a bell is acked when it is heard, before the claim"""
    make_app = worker_app.make_app

    def early(*args: Any, **options: Any) -> Celery:
        return make_app(*args, **options | {"acks_late": False})

    yield patch.object(process, "make_app", early)


def early_ack_and_no_ringer() -> Patches:
    """a bell is acked when it is heard, and nobody rings again"""
    yield from early_ack()
    yield from no_ringer()


def duplicates_rejected() -> Patches:
    """a bell for a job that is not to be had is rejected and queued again, not dropped"""
    claim, thread = tasks.claim, threading.local()

    def watched(*args: Any, **options: Any) -> Any:
        lease = claim(*args, **options)
        thread.refused = lease is None
        return lease

    def register(app: Celery, story: Callable[[str], None]) -> None:
        def answer(*args: Any, **_: Any) -> None:
            thread.refused = False
            if args:
                story(str(args[0]))
            if thread.refused:
                raise Reject(requeue=True)

        app.task(name=TASK, ignore_result=True)(answer)

    yield patch.object(tasks, "claim", watched)
    yield patch.object(process, "register", register)


def swapped_slots() -> Patches:
    """pictures that are ready together go to each other's jobs"""
    step = Engine.step

    def swapped(self: Engine) -> list[Finished]:
        results = step(self)
        drawn = [result for result in results if result.image is not None]
        images = [result.image for result in drawn]
        others = {
            id(result): Finished(result.id, result.request, image)
            for result, image in zip(drawn, images[1:] + images[:1], strict=True)
        }
        return [others.get(id(result), result) for result in results]

    yield patch.object(Engine, "step", swapped)


def saved_rows_ignored() -> Patches:
    """what a leaving worker kept of a job is not looked at"""
    yield patch.object(tasks, "saved_rows", lambda claim, storage: None)


_MUTATIONS: Collection[Callable[[], Patches]] = (
    no_fencing,
    attempt_counted_late,
    crash_counted_late,
    suspects_in_company,
    no_vouching,
    cancel_overwritten,
    sweep_in_steps,
    worker_clock,
    begin_deferred,
    no_sweeper,
    no_ringer,
    uncapped_ringer,
    early_ack,
    early_ack_and_no_ringer,
    duplicates_rejected,
    swapped_slots,
    saved_rows_ignored,
)
#: By name.
MUTATIONS = {mutation.__name__: mutation for mutation in _MUTATIONS}


def apply(name: str) -> None:
    """Break this process for good."""
    for change in MUTATIONS[name]():
        change.start()


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """Break this process while the block runs."""
    with contextlib.ExitStack() as stack:
        for change in MUTATIONS[name]():
            stack.enter_context(change)
        yield
