"""What the zygote's processes do: a worker with the fake runner, and a producer."""

from __future__ import annotations

import importlib
import json
import resource
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jobs import storage_s3, store_lease
from jobs.bell import transport_options
from jobs.client import Client
from jobs.settings import Settings
from jobs.store_read import stored_spec
from tests.faults import callers
from tests.faults.fake_runner import fake_workshop
from worker import app as worker_app
from worker import logs
from worker import process as worker_process
from worker.lifeline import Lifeline
from worker.preflight import open_services
from worker.process import Options, run
from worker.sweeper import pace_for
from worker.told import told_in_a_sentence


def worker(
    options: Mapping[str, Any],
    tally: str,
    fake: Mapping[str, Any],
    mutation: str = "",
    limits: Mapping[str, int] | None = None,
    clock_step_s: float = 0.0,
    broker: Mapping[str, Any] | None = None,
    deaf_s: float = 0.0,
    paced_s: float = 0.0,
    s3_answer_s: float = 0.0,
    unreadable_s: float = 0.0,
    knows: Sequence[str] = (),
    lifeline: Lifeline | None = None,
) -> int:
    """`nightshift worker` from the settings on, with a fake runner.

    mutation: a name in `tests.faults.mutations`, which breaks our own code. limits: see `set_limit`. clock_step_s: how
    far its wall clock is from the others'. broker: more of kombu's transport options. deaf_s: how long it may hear
    nothing, in place of what suits its leases. paced_s: it sweeps and rings as with leases so long. s3_answer_s: how
    long it waits for an answer of S3. unreadable_s: how long it leaves a job that it cannot read. knows: fields of a
    spec that only this worker's version has. lifeline: the tie to its supervisor.
    """
    if broker:
        patch.object(worker_app, "transport_options", lambda url: {**transport_options(url), **broker}).start()
    if deaf_s:
        patch.object(worker_process, "patience_for", lambda _: deaf_s).start()
    if paced_s:
        patch.object(worker_process, "pace_for", lambda url, _: pace_for(url, paced_s)).start()
    if s3_answer_s:
        patch.object(storage_s3, "READ_S", s3_answer_s).start()
    if unreadable_s:
        patch.object(store_lease, "UNREADABLE_WAIT_S", unreadable_s).start()
    if knows:
        patch.object(store_lease, "stored_spec", lambda text: stored_spec(without(text, knows))).start()
    for name, limit in (limits or {}).items():
        set_limit(name, limit)
    if clock_step_s:
        step_clock(clock_step_s)
    if mutation:
        importlib.import_module("tests.faults.mutations").apply(mutation)
    with told_in_a_sentence():
        logs.set_up(as_json=False)
        settings = Settings()
        return run(
            open_services(settings),
            settings,
            Options(**options),
            lambda: fake_workshop(tally=Path(tally), **fake),
            lifeline,
        )


def producer(specs: Sequence[Mapping[str, Any]], batch: str, keys: Sequence[str] | None = None) -> int:
    """Submit these specs, all in one transaction."""
    logs.set_up(as_json=False)
    with Client() as client:
        client.submit_many(specs, batch=batch, idempotency_keys=keys)
    return 0


def call(function: str, arguments: Mapping[str, Any]) -> int:
    """What `tests.faults.callers` says under this name."""
    code: int = getattr(callers, function)(**arguments)
    return code


def without(text: str, fields: Sequence[str]) -> str:
    """A stored spec without these fields."""
    return json.dumps({name: value for name, value in json.loads(text).items() if name not in fields})


def set_limit(name: str, limit: int) -> None:
    """Limit this process. AS_MORE: bytes of memory above what it has now. THREADS: more threads than that cannot be
    started, as the kernel answers where RLIMIT_NPROC is reached (which does not hold for root)."""
    if name == "THREADS":
        limit_threads(limit)
    elif name == "AS_MORE":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit += pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    else:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def limit_threads(limit: int) -> None:
    """Let the start of a thread fail while so many run."""
    start: Any = threading._start_new_thread  # type: ignore[attr-defined]

    def refuse(*arguments: Any) -> Any:
        if threading.active_count() >= limit:
            raise RuntimeError("can't start new thread")
        return start(*arguments)

    threading._start_new_thread = refuse  # type: ignore[attr-defined]


def burn() -> int:
    """Keep a core busy until killed."""
    while True:
        pass


def step_clock(seconds: float) -> None:
    """Shift this process's wall clock; durations are measured on another."""
    true_time, true_time_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(1e9 * seconds)
