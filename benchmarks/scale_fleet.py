"""Many worker processes around one PostgreSQL and one Redis, and what they cost: the measuring half of `scale`."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import redis

from benchmarks.goals import spread
from jobs.fields import URGENT_PRIORITY
from jobs.spec import JobSpec
from jobs.states import State
from jobs.store import Store
from jobs.views import Claim, Output
from tests import servers
from tests.faults import lanes, zygote
from tests.faults.fake_runner import Entry
from tests.faults.harness import Night, Worker
from tests.faults.lanes import Place
from worker.lookout import BELL_AGE_S
from worker.process import Options

#: What a worker uses unless it is told otherwise.
DEFAULTS: Mapping[str, float] = {name: getattr(Options(8), name) for name in ("lease_s", "beat_s", "poll_s", "grace_s")}
#: So that the measurement, and not PostgreSQL's default of 100, says how many workers there may be.
MAX_CONNECTIONS = 900
#: The prompt of jobs that come before the clock starts.
WARM = "warm"
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a fleet draws: `steps` of `step_s` seconds, `at_once` jobs in each worker."""

    name: str
    steps: int
    step_s: float
    at_once: int


class Fleet:
    """Servers and the zygote that all measurements share."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._numbers = folder, itertools.count()
        cluster = stack.enter_context(servers.postgres_cluster())
        with psycopg.connect(cluster.url, autocommit=True) as connection:
            connection.execute(f"ALTER SYSTEM SET max_connections = {MAX_CONNECTIONS}".encode())
        cluster.stop()
        cluster.start()
        self.postgres, self.redis = cluster.url, stack.enter_context(servers.redis_server())
        self._database = lanes.migrated_database(self.postgres)
        self._zygote = stack.enter_context(zygote.running())

    @contextmanager
    def night(self) -> Iterator[Night]:
        """PostgreSQL and Redis, each empty; pictures go into a directory, for no storage is measured here."""
        folder = self._folder / f"night-{next(self._numbers)}"
        folder.mkdir()
        with lanes.production(folder, self.postgres, self._database, self.redis) as settings:
            here = settings.model_copy(update={"storage_url": f"file://{folder / 'pictures'}"})
            with Night(Place("production", here, self._zygote), 1, folder) as night:
                night._defaults |= DEFAULTS
                yield night


# What it costs


@dataclass(frozen=True, slots=True)
class Cost:
    """What was used up so far: transactions, and seconds of CPU."""

    at_s: float
    transactions: float
    postgres_s: float
    redis_s: float
    workers_s: float


class Meter:
    """Reads the costs of a night. Its own connection is one more to the server; it asks nothing while it waits."""

    def __init__(self, night: Night, redis_url: str, stack: ExitStack) -> None:
        self._night = night
        url = night.settings.database_url
        self._connection = stack.enter_context(psycopg.connect(url, autocommit=True))
        self._redis = stack.enter_context(redis.Redis.from_url(redis_url))
        self._postmaster = _parent(self._connection.info.backend_pid)

    def read(self) -> Cost:
        """The costs until now; a backend reports what it did after a second at the latest."""
        transactions = self._ask("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s")
        info: Any = self._redis.info("cpu")
        return Cost(
            time.monotonic(),
            float(transactions),
            family_cpu_s(self._postmaster),
            info["used_cpu_user"] + info["used_cpu_sys"],
            sum(cpu_s(worker.pid) for worker in self._night.workers),
        )

    def connections(self) -> int:
        """Open ones of this database, but for the meter's."""
        return int(self._ask("SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = %s"))

    def broker_clients(self) -> int:
        """Open connections to Redis, but for the meter's."""
        info: Any = self._redis.info("clients")
        return int(info["connected_clients"]) - 1

    def _ask(self, question: str) -> Any:
        row = self._connection.execute(question.encode(), [self._connection.info.dbname]).fetchone()
        assert row is not None
        return row[0]


def cpu_s(pid: int) -> float:
    """Seconds of CPU of a process, with all its threads; 0 when it has ended."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS if fields else 0.0


def family_cpu_s(pid: int) -> float:
    """Seconds of CPU of a process, its living children and those that it has reaped. To the nanosecond for the living:
    a connection's share of a measurement is less than a tick of the usual clock."""
    fields = _stat(pid)
    reaped = (int(fields[13]) + int(fields[14])) / _TICKS
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return reaped + sum(_scheduled_s(int(child)) for child in [str(pid), *children])


def _scheduled_s(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:
        return 0.0


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


# A fleet at work


def started(night: Night, count: int, kind: Kind) -> list[Worker]:
    """So many workers, all of which hear bells."""
    workers = [night.worker(concurrency=kind.at_once, step_s=kind.step_s) for _ in range(count)]
    return [worker.ready() for worker in workers]


def throughput(fleet: Fleet, workers: int, kind: Kind, jobs: int) -> dict[str, Any]:
    """Jobs a second of a fleet whose queue is full, and what a job costs."""
    with fleet.night() as night, ExitStack() as stack:
        meter = Meter(night, fleet.redis, stack)
        started(night, workers, kind)
        first = len(night.submit(2 * workers * kind.at_once, prompt=WARM, steps=2))
        night.wait_until(lambda: len(night.entries("drawn")) >= first, "the first jobs")  # connections are open now
        time.sleep(1.1)  # until the backends have told what the start cost
        before = meter.read()
        night.submit(jobs, steps=kind.steps)
        connections = clients = looks = 0
        while len(drawn := _measured(night, "drawn")) < jobs:
            if looks % 4 == 0:  # a look costs the server as much as a job does
                connections = max(connections, meter.connections())
                clients = max(clients, meter.broker_clients())
            looks += 1
            time.sleep(0.5)
        while night.client.counts()[State.succeeded] < first + jobs:
            time.sleep(0.1)
        after = meter.read()
        began = _measured(night, "began")
    spent_s = after.at_s - before.at_s
    return {
        "workers": workers,
        "jobs": jobs,
        "jobs_per_s": round(steady_rate(began, drawn, workers), 3),
        "connections_per_worker": round(connections / workers, 1),
        "broker_clients_per_worker": round(clients / workers, 1),
        "transactions_per_job": round((after.transactions - before.transactions) / jobs, 1),
        "postgres_ms_per_job": round(1e3 * (after.postgres_s - before.postgres_s) / jobs, 2),
        "postgres_cores_busy": round((after.postgres_s - before.postgres_s) / spent_s, 3),
        "redis_ms_per_job": round(1e3 * (after.redis_s - before.redis_s) / jobs, 2),
        "worker_ms_per_job": round(1e3 * (after.workers_s - before.workers_s) / jobs, 2),
        "worker_s_per_job": round(workers * spent_s / jobs, 3),
        "cores_busy": round(
            sum(getattr(after, part) - getattr(before, part) for part in ("postgres_s", "redis_s", "workers_s"))
            / spent_s,
            2,
        ),
    }


def _measured(night: Night, what: str) -> list[Entry]:
    return [entry for entry in night.entries(what) if not entry.prompt.startswith(WARM)]


def steady_rate(began: Sequence[Entry], drawn: Sequence[Entry], workers: int) -> float:
    """Jobs a second from the moment when every worker had one until the last one began: neither the start nor the end
    counts, where some of them wait. A job that lies in this window by a half counts as a half."""
    first: dict[int, float] = {}
    for entry in began:
        first.setdefault(entry.pid, entry.at_s)
    opens = sorted(first.values())[-1] if len(first) >= workers else min(first.values())
    closes = max(entry.at_s for entry in began)
    ends = {entry.prompt: entry.at_s for entry in drawn}
    done = 0.0
    for entry in began:
        end = ends[entry.prompt]
        done += max(0.0, min(end, closes) - max(entry.at_s, opens)) / max(end - entry.at_s, 1e-9)
    return done / max(closes - opens, 1e-9)


def claim_latency(fleet: Fleet, workers: int, kind: Kind, samples: int, seconds: float) -> dict[str, Any]:
    """Milliseconds from the insertion of a row until its claim, on the database's clock, while workers are free; and
    what such a fleet costs a second while it has nothing to do."""
    with fleet.night() as night, ExitStack() as stack:
        meter = Meter(night, fleet.redis, stack)
        started(night, workers, kind)
        time.sleep(1.1)
        before = meter.read()
        time.sleep(seconds)
        after = meter.read()
        for _ in range(samples):
            night.submit(1, steps=1)
            time.sleep(night.rng.uniform(0.05, 0.15))
        while night.client.counts()[State.succeeded] < samples:
            time.sleep(0.1)
        views = night.client.jobs()
        waits = [(view.started_at - view.created_at).total_seconds() * 1e3 for view in views if view.started_at]
    idle_s = workers * (after.at_s - before.at_s)
    return {
        "workers": workers,
        "submit_to_claim_ms": spread(waits) | {"p95": round(sorted(waits)[int(0.95 * len(waits))], 1)},
        "idle_transactions_per_worker_s": round((after.transactions - before.transactions) / idle_s, 2),
        "idle_postgres_ms_per_worker_s": round(1e3 * (after.postgres_s - before.postgres_s) / idle_s, 3),
        "idle_worker_ms_per_s": round(1e3 * (after.workers_s - before.workers_s) / idle_s, 2),
    }


# Each statement for itself


def statements(fleet: Fleet, rounds: int) -> dict[str, float]:
    """Milliseconds of PostgreSQL's CPU of each thing that a worker asks of it, with 10,000 jobs in the table."""
    with fleet.night() as night, closing(Store.open(night.settings.database_url)) as store:
        backend = psycopg.connect(night.settings.database_url)
        with closing(backend):
            postmaster = _parent(backend.info.backend_pid)
        claims: list[Claim] = []

        def claim(job_id: UUID) -> None:
            found = store.claim(job_id, f"bench:{len(claims) // 8}:1", lease_s=3600.0)
            assert found is not None
            claims.append(found)

        one = Output(0, "images/x", 1, 512, 512, "0" * 64, 400_000)
        # A queue with nothing in it, as idle workers find it: their ringers ask only when they have room.
        asked: dict[str, Callable[[], object]] = {"due": lambda: store.due(8, models=["m"], older_than_s=15.0)}
        cost = {name: _cost(postmaster, rounds, call) for name, call in asked.items()}
        ids = [view.id for view in store.submit([JobSpec(prompt="x")] * 10_000)]
        todo = iter(ids)
        cost["claim"] = _cost(postmaster, rounds, lambda: claim(next(todo)))
        mine = [claim.token for claim in claims[:8]]  # those of one GPU
        asked = {
            "heartbeat": lambda: store.heartbeat("bench:0:1", mine),
            "cancel_poll": lambda: store.cancel_requested("bench:0:1"),
            "sweep": store.sweep,
            "lookout": lambda: store.due(
                2, models=["m"], older_than_s=BELL_AGE_S, priority_from=URGENT_PRIORITY
            ),  # no urgent job waits, as usual
        }
        cost |= {name: _cost(postmaster, rounds, call) for name, call in asked.items()}
        left = iter(claims)
        cost["finish"] = _cost(postmaster, rounds, lambda: store.finish(next(left), [one]))
        return {name: round(value, 4) for name, value in cost.items()}


def _cost(postmaster: int, rounds: int, call: Callable[[], object]) -> float:
    """Milliseconds of PostgreSQL's CPU of one call."""
    before = family_cpu_s(postmaster)
    for _ in range(rounds):
        call()
    return 1e3 * (family_cpu_s(postmaster) - before) / rounds
