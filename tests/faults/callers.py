"""What processes without a worker do to a database in the fault suite: many at once, or until they are killed.

Each runs in a process of the zygote (`targets.call`) and leaves a line of text for each thing that it was told is done,
written by one call, so that a kill tears none.
"""

from __future__ import annotations

import itertools
import os
import random
import sqlite3
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

from jobs.client import Client
from jobs.db import BUSY_TIMEOUT_S
from jobs.spec import JobSpec
from jobs.store import Store
from jobs.views import Output


def note(path: str, *words: object) -> None:
    """Append one line."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, ("\t".join(map(str, words)) + "\n").encode())
    finally:
        os.close(descriptor)


def notes(path: Path) -> list[list[str]]:
    """The words of each line so far."""
    return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []


def until(moment_s: float) -> None:
    """Sleep until the machine's monotonic clock, the same for all processes, shows this moment."""
    time.sleep(max(0.0, moment_s - time.monotonic()))


def _in_threads(count: int, work: Callable[[], None], out: str) -> int:
    """`work` in so many threads; each error becomes a line of its own."""

    def guarded() -> None:
        try:
            work()
        except Exception as error:
            note(out, "error", " ".join(str(error).split())[:300])
            traceback.print_exc()

    with ThreadPoolExecutor(count) as pool:
        for _ in range(count):
            pool.submit(guarded)
    return 0


def claim_all(url: str, ids: Sequence[str], threads: int, seed: int, start_s: float, out: str) -> int:
    """Try to claim each of these jobs once, in an order of our own, by so many threads."""
    store = Store.open(url)
    mine = list(ids)
    random.Random(seed).shuffle(mine)
    waiting = iter(mine)

    def work() -> None:
        until(start_s)
        for job_id in waiting:
            claim = store.claim(UUID(job_id), f"worker-{os.getpid()}")
            if claim is not None:
                note(out, "claimed", job_id)

    return _in_threads(threads, work, out)


def submit_one_key(key: str, threads: int, start_s: float, out: str) -> int:
    """Submit with the same idempotency key from so many threads at once, each with a client of its own."""

    def work() -> None:
        with Client() as client:
            until(start_s)
            note(out, "job", client.submit("one", idempotency_key=key).id)

    return _in_threads(threads, work, out)


def submit_many(count: int, start_s: float, out: str) -> int:
    """Submit one job after the other."""
    with Client() as client:
        until(start_s)
        for number in range(count):
            began = time.monotonic()
            try:
                note(out, "job", client.submit(f"late {number}").id, f"{time.monotonic() - began:.3f}")
            except Exception as error:
                note(out, "error", " ".join(str(error).split())[:300])
    return 0


def hold_exclusive(path: str, seconds: float, out: str) -> int:
    """Hold the write lock of a SQLite database, as another program's long transaction does."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
    connection.execute("BEGIN EXCLUSIVE")
    note(out, "locked")
    time.sleep(seconds)
    connection.execute("ROLLBACK")
    note(out, "unlocked")
    return 0


def finish_for_ever(url: str, out: str) -> int:
    """Submit, claim and finish jobs until killed; a line for each that the database said is shown."""
    store = Store.open(url)
    for number in itertools.count():
        (view,) = store.submit([JobSpec(prompt=f"{os.getpid()} {number}")])
        note(out, "submitted", view.id)
        claim = store.claim(view.id, f"worker-{os.getpid()}")
        assert claim is not None, "nobody else claims it"
        output = Output(0, f"images/{view.id}/{claim.token}/0.png", number, 64, 64, "0" * 64, 1)
        if store.finish(claim, [output]):
            note(out, "shown", view.id)
    raise AssertionError("unreachable")
