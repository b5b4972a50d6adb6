"""Many processes at one database, and processes that die in the middle of a commit: rows 27, 28, 29 and 45."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from jobs.spec import JobSpec
from jobs.states import State
from tests.faults.callers import notes
from tests.faults.checker import check
from tests.faults.harness import Night
from tests.faults.lanes import only
from tests.faults.zygote import Forked

#: Processes that were forked now are all at their work by then.
GATE_S = 0.4


def call(night: Night, function: str, *, failpoint: str = "", **arguments: object) -> Forked:
    """A process that does one of `callers`."""
    return night.fork("call", failpoint=failpoint, function=function, arguments=arguments)


def database_file(night: Night) -> Path:
    return Path(str(night.store.engines.writer.url.database))


@pytest.mark.fault_slice
def test_row_28_each_job_is_claimed_once_by_many_processes(night: Night) -> None:
    """4 processes x 8 threads claim"""
    jobs = 5000 if night.seed == 2 else 300
    ids = [str(view.id) for view in night.store.submit([JobSpec(prompt="x")] * jobs)]
    out = night.folder / "claims"
    start_s = time.monotonic() + GATE_S
    shared: dict[str, Any] = {
        "url": night.settings.database_url,
        "ids": ids,
        "threads": 8,
        "start_s": start_s,
        "out": str(out),
    }
    claimers = [call(night, "claim_all", seed=4 * night.seed + number, **shared) for number in range(4)]
    assert [claimer.wait(120) for claimer in claimers] == [0] * 4
    said = notes(out)
    assert [words for words in said if words[0] == "error"] == []
    assert Counter(job_id for _, job_id in said) == Counter(ids)
    assert {(view.state, view.attempts) for view in night.store.jobs()} == {(State.running, 1)}


@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.fault_slice)])
def test_row_45_twenty_submits_with_one_key_make_one_job(night: Night, processes: int) -> None:
    """20 parallel submits with one idempotency key"""
    out = night.folder / "ids"
    start_s = time.monotonic() + GATE_S
    shared: dict[str, Any] = {
        "key": f"night-{night.seed}",
        "threads": 20 // processes,
        "start_s": start_s,
        "out": str(out),
    }
    submitters = [call(night, "submit_one_key", **shared) for _ in range(processes)]
    assert [submitter.wait() for submitter in submitters] == [0] * processes
    (view,) = night.adopt()
    assert notes(out) == [["job", str(view.id)]] * 20
    worker = night.worker().ready()
    night.wait_ended()
    print(check(night, broker=True))
    worker.stop()


@only("embedded")
def test_row_27_a_locked_database_makes_producers_wait_and_tells_them_nothing(night: Night) -> None:
    """SQLite locked by another process, producers"""
    lock_s = 15.0 if night.seed == 2 else 1.0
    locked, out = night.folder / "lock", night.folder / "ids"
    holder = call(night, "hold_exclusive", path=str(database_file(night)), seconds=lock_s, out=str(locked))
    night.wait_until(lambda: notes(locked), "the lock")
    submitters = [call(night, "submit_many", count=5, start_s=0.0, out=str(out)) for _ in range(2)]
    assert [submitter.wait() for submitter in submitters] == [0, 0]
    assert holder.wait() == 0
    said = notes(out)
    assert Counter(words[0] for words in said) == {"job": 10}, said
    assert max(float(words[2]) for words in said) > 0.5 * lock_s, "the lock was in nobody's way"
    assert night.store.counts()[State.queued] == 10


@only("embedded")
@pytest.mark.fault_slice
def test_row_29_a_killed_writer_takes_back_nothing_shown_and_leaves_a_sound_file(night: Night) -> None:
    """kill -9 during SQLite commits; then the end of its log is lost"""
    out = night.folder / "done"
    for kills in range(4):
        # Half of them by a failpoint inside a commit, half from outside at any moment.
        failpoint = f"before_finish_commit:kill9@nth={night.rng.randint(5, 30)}" if kills % 2 else ""
        url, already = night.settings.database_url, len(notes(out))
        writers = [call(night, "finish_for_ever", url=url, out=str(out), failpoint=failpoint) for _ in range(2)]
        night.wait_until(lambda already=already: len(notes(out)) > already + 10, "commits")  # type: ignore[misc]
        time.sleep(night.rng.uniform(0.0, 0.05))
        for writer in writers:
            writer.kill()
        assert [writer.wait() for writer in writers] == [-9, -9]
        check_sound(database_file(night))
        states = {str(view.id): view.state for view in night.store.jobs()}
        assert {states[words[1]] for words in notes(out) if words[0] == "shown"} == {State.succeeded}
        assert all(words[1] in states for words in notes(out))
    for cut in range(5):
        check_sound(torn_copy(database_file(night), night.folder / f"cut-{cut}", night.rng))


def torn_copy(database: Path, folder: Path, rng: random.Random) -> Path:
    """The database as after a power loss: its write-ahead log ends somewhere, or is not there at all."""
    folder.mkdir()
    copied = Path(shutil.copy(database, folder))
    log = database.with_name(database.name + "-wal")
    if log.exists() and rng.random() < 0.8:
        torn = Path(shutil.copy(log, folder))
        os.truncate(torn, rng.randint(0, torn.stat().st_size))
    return copied


def check_sound(database: Path) -> None:
    """The file is whole, and each row says one thing: shown with its image, or neither."""
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        images = "(SELECT count(*) FROM image WHERE job_id = job.id)"
        states = set(connection.execute(f"SELECT DISTINCT state, {images} FROM job"))
        assert states <= {("succeeded", 1), ("queued", 0), ("running", 0)}
