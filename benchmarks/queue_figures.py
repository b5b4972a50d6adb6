"""`make figures`: how fast the queue is, how soon it notices, and what its promise costs.

The engine is the real one around a fake runner (a step sleeps 2 ms and draws nothing), so that what is measured is the
queue. Times of other processes are read off the machine's monotonic clock, the same for all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from benchmarks import report
from jobs import State, schema
from jobs.spec import JobSpec
from jobs.store import Store
from sd_engine import Request
from tests import servers
from tests.faults import lanes, zygote
from tests.faults.fake_runner import fake_workshop
from tests.faults.harness import Night
from tests.faults.lanes import Place
from worker.engine_thread import EngineThread
from worker.heartbeat import Heartbeat
from worker.leases import Leases
from worker.process import Options

PROCESSES, THREADS = 4, 8
#: What a worker uses unless it is told otherwise.
DEFAULTS: Mapping[str, float] = {name: getattr(Options(8), name) for name in ("lease_s", "beat_s", "poll_s", "grace_s")}


class Bench:
    """Servers and processes that the figures share."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._numbers = folder, itertools.count()
        self.postgres = stack.enter_context(servers.postgres_server())
        self._redis = stack.enter_context(servers.redis_server())
        s3 = stack.enter_context(servers.rclone_s3())
        lanes.make_bucket(s3)
        os.environ.update(s3.environment)
        self._file = lanes.migrated_file(folder)
        self._database = lanes.migrated_database(self.postgres)
        self._zygote = stack.enter_context(zygote.running())

    @contextmanager
    def night(self, lane: str) -> Iterator[Night]:
        """A night on this lane, whose workers keep the default times."""
        folder = self._folder / f"night-{next(self._numbers)}"
        folder.mkdir()
        with ExitStack() as stack:
            settings = (
                lanes.embedded(folder, self._file)
                if lane == "embedded"
                else stack.enter_context(lanes.production(folder, self.postgres, self._database, self._redis))
            )
            night = stack.enter_context(Night(Place(lane, settings, self._zygote), 1, folder))
            night._defaults |= DEFAULTS
            yield night

    @contextmanager
    def fresh(self, kind: str) -> Iterator[str]:
        """The URL of an empty database of this kind."""
        if kind == "sqlite":
            yield f"sqlite:///{self._folder / f'{next(self._numbers)}.db'}"
            return
        with servers.fresh_database(self.postgres) as url:
            yield url


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float | int]:
    """Median, and what lies around it."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), digits),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], digits),
        "least": round(ordered[0], digits),
        "most": round(ordered[-1], digits),
        "count": len(ordered),
    }


# Claims a second


def claims(bench: Bench, kind: str, jobs: int, rounds: int) -> dict[str, float | int]:
    """4 processes of 8 threads claim; each job is there for one of them."""
    return spread([_claims_once(bench, kind, jobs) for _ in range(rounds)], 1)


def _claims_once(bench: Bench, kind: str, jobs: int) -> float:
    with bench.fresh(kind) as url:
        with closing(Store.open(url)) as store:
            schema.upgrade(store.engines)
            ids = [view.id for view in store.submit([JobSpec(prompt="x")] * jobs)]
        random.Random(1).shuffle(ids)
        with ExitStack() as stack:
            claimers = [stack.enter_context(_claimer(url, ids[i::PROCESSES])) for i in range(PROCESSES)]
            for claimer in claimers:
                assert _line(claimer) == "ready"
            for claimer in claimers:
                _tell(claimer, "go")
            done = [json.loads(_line(claimer)) for claimer in claimers]
    claimed: int = sum(count for count, _, _ in done)
    assert claimed == jobs, f"{claimed} of {jobs} jobs were claimed"
    seconds: float = max(end for _, _, end in done) - min(begin for _, begin, _ in done)
    return claimed / seconds


def _claimer(url: str, ids: Sequence[UUID]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.queue_claims"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    _tell(process, json.dumps({"url": url, "ids": [str(id) for id in ids], "threads": THREADS}))
    return process


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    print(line, file=process.stdin, flush=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# Times of a worker


def idle_start(bench: Bench, lane: str, samples: int) -> dict[str, float | int]:
    """Seconds from the call of submit, by a producer, until an idle worker's engine has the row."""
    with bench.night(lane) as night:
        night.worker().ready()
        night.submit(1, steps=1)
        night.wait_ended()
        waits = []
        for _ in range(samples):
            time.sleep(night.rng.uniform(0.1, 0.4))  # so that no sample keeps time with a round of the ringer
            began = time.monotonic()
            (job,) = night.submit(1, steps=1)
            night.wait_ended()
            waits.append(_moments(night, "began")[job.spec.prompt] - began)
    return spread(waits)


def refill(bench: Bench, lane: str, jobs: int, concurrency: int) -> dict[str, float | int]:
    """Seconds from a picture that is drawn until the engine has the next row in its place; a full queue."""
    with bench.night(lane) as night:
        night.submit(jobs, steps=20)
        night.worker(concurrency=concurrency).ready()
        night.wait_ended()
        drawn = sorted(_moments(night, "drawn").values())
        began = sorted(_moments(night, "began").values())
    # All places are taken in the beginning; from then on the nth row to come takes the nth place to become free.
    return spread([start - free for free, start in zip(drawn, began[concurrency:], strict=False)])


def recovery(bench: Bench, lane: str, repetitions: int) -> dict[str, Any]:
    """Seconds from kill -9 of a worker with 8 jobs, at the default lease of 30 s, until they are back, and drawn."""
    back, restarted, ended = [], [], []
    for _ in range(repetitions):
        with bench.night(lane) as night:
            night.submit(8, steps=40)
            doomed = night.worker(step_s=0.1).ready()
            night.wait_running(8)
            night.wait_steps(night.jobs)
            night.worker().ready()
            time.sleep(night.rng.uniform(0.0, 1.0))
            doomed.kill()
            died = time.monotonic()
            night.wait_until(lambda: not doomed.holds(), "their return", 60.0)  # noqa: B023 - called at once
            back.append(time.monotonic() - died)
            night.wait_ended(120.0)
            ended.append(time.monotonic() - died)
            again = [entry.at_s for entry in night.entries("began") if entry.pid != doomed.pid]
            restarted.append(min(again) - died)
            assert all(view.state is State.succeeded for view in night.ended.values())
    return {
        "all_back_in_the_queue_s": spread(back, 2),
        "first_drawn_again_s": spread(restarted, 2),
        "all_ended_s": spread(ended, 2),
        "lease_s": DEFAULTS["lease_s"],
    }


def _moments(night: Night, what: str) -> dict[str, float]:
    return {entry.prompt: entry.at_s for entry in night.entries(what)}


# What the checks cost


def checks(bench: Bench, kind: str, steps: int, rounds: int) -> dict[str, Any]:
    """Milliseconds that heartbeat and cancel checks add to a step of 8 rows; with the default times, and a hundred
    times as often, where a difference can be seen."""
    with bench.fresh(kind) as url, closing(Store.open(url)) as store:
        schema.upgrade(store.engines)
        leases = Leases(lambda token, reason: None)
        for view in store.submit([JobSpec(prompt="x")] * 8):
            claim = store.claim(view.id, "bench", lease_s=3600.0)
            assert claim is not None
            leases.take(claim, time.monotonic())
        beats: Mapping[str, Callable[[], Heartbeat | None]] = {
            "none": lambda: None,
            "default": lambda: _heartbeat(store, leases, DEFAULTS["beat_s"], DEFAULTS["poll_s"]),
            "hundredfold": lambda: _heartbeat(store, leases, DEFAULTS["beat_s"] / 100, DEFAULTS["poll_s"] / 100),
        }
        runs: dict[str, list[float]] = {name: [] for name in beats}
        for _ in range(rounds):  # in turn, so that what else the machine does hits all of them
            for name, make in beats.items():
                runs[name].append(1000 * _step_s(make(), steps))
    medians = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "step_ms": {name: spread(values) for name, values in runs.items()},
        "added_ms_per_step": round(medians["default"] - medians["none"], 4),
        "added_ms_per_step_hundredfold": round(medians["hundredfold"] - medians["none"], 4),
    }


def _heartbeat(store: Store, leases: Leases, beat_s: float, poll_s: float) -> Heartbeat:
    return Heartbeat(store, leases, "bench", lease_s=3600.0, beat_s=beat_s, poll_s=poll_s)


def _step_s(heartbeat: Heartbeat | None, steps: int) -> float:
    """Seconds of one step of 8 rows in the engine's thread, beside this heartbeat."""
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineThread(lambda: fake_workshop(tally=Path(folder) / "tally"))
        engine.start()
        engine.ready.result()
        if heartbeat is not None:
            heartbeat.start()
        requests = [Request(prompt=str(i), seed=i, steps=steps, guidance=None, width=64, height=64) for i in range(8)]
        began = time.monotonic()
        engine.render(UUID(int=1), requests).result()
        took = time.monotonic() - began
        if heartbeat is not None:
            heartbeat.stop()
        engine.close()
        engine.join()
    return took / steps


def figures(bench: Bench, quick: bool) -> dict[str, Callable[[], Any]]:
    """What measures each figure, by the figure's name."""
    samples, rounds = (20, 2) if quick else (200, 5)
    chosen: dict[str, Callable[[], Any]] = {}
    for kind in ("sqlite", "postgresql"):
        chosen[f"claims_per_s_{kind}"] = partial(claims, bench, kind, 400 if quick else 2000, rounds)
        chosen[f"checks_{kind}"] = partial(checks, bench, kind, 200 if quick else 500, rounds)
    for lane in lanes.LANES:
        chosen[f"idle_submit_to_start_s_{lane}"] = partial(idle_start, bench, lane, samples)
        for concurrency in (1, 8):
            chosen[f"freed_slot_filled_s_{lane}_{concurrency}"] = partial(refill, bench, lane, samples, concurrency)
        chosen[f"recovery_after_kill9_{lane}"] = partial(recovery, bench, lane, 1 if quick else 3)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.queue_figures", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples, and nothing is written")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="figures with this in their name; nothing is written"
    )
    options = parser.parse_args()
    load_before, result = os.getloadavg()[0], dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="nightshift-figures-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack)
        for name, measure in figures(bench, options.quick).items():
            if options.only in name:
                result[name] = measure()
                print(f"{name}: {result[name]}", flush=True)
    if not options.quick and not options.only:
        about = {
            "runner": "fake: a step sleeps 2 ms and draws nothing; engine, packer, store, broker and storage are real",
            "servers": "SQLite, synchronous=NORMAL; PostgreSQL, fsync=off; Redis; S3 by rclone; all on this machine",
            "claims": f"{PROCESSES} processes x {THREADS} threads",
            "load_average_before_and_after": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        }
        path = report.RESULTS / "queue_figures.json"
        report.write(path, about | result, beside=("celery", "kombu", "redis", "sqlalchemy", "psycopg"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers must be stopped too
    main()
