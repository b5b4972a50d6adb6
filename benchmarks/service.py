"""`python -m benchmarks.service`: what is left of the engine's speed when a service is built around it.

The same jobs, with the shipped model on the CPU: drawn by the engine alone, and by `nightshift worker` from the queue,
with database, broker, PNG and storage; embedded (SQLite, a directory) and in production (PostgreSQL, Redis, S3 by
rclone). In turn, in one run. All of it shares the machine's cores with the engine, which it would not beside a GPU: so
the engine has one thread first, which leaves a core to the rest, and then as many as there are cores; and the CPU
seconds of the servers and of the worker's other threads are told beside the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from benchmarks.goals import Goal, as_json, at_least, spread
from benchmarks.scale_fleet import cpu_s, family_cpu_s
from jobs import Client, Settings, State
from tests import servers
from tests.faults import lanes
from tests.integration.processes import ROOT, has_line, process, wait_until

EXAMPLES = """examples:
  python -m benchmarks.service                           the shipped model's own size, 20 steps
  python -m benchmarks.service --side 192 --jobs 24      larger pictures: more engine for each job
  python -m benchmarks.service --quick                   two small jobs, seconds"""
LANES = lanes.LANES
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("star", "circle", "square", "triangle")


@dataclass(frozen=True, slots=True)
class Run:
    """Jobs from the first to the last. Seconds: of the clock, of CPU in the drawing process and in the servers, and
    until the first claim."""

    wall_s: float
    own_cpu_s: float
    servers_cpu_s: float = 0.0
    first_claim_s: float = 0.0


def jobs_of(count: int, steps: int, side: int, seed: int) -> list[dict[str, Any]]:
    """So many different jobs, as both sides take them.

    Their steps differ by up to a half either way, as those of a night do: else all would be stored in one moment, while
    the engine has nothing to draw.
    """
    return [
        {
            "prompt": f"a {COLOURS[i % 4]} {SHAPES[i // 4 % 4]} on a {COLOURS[(i + 1) % 4]} background",
            "seed": seed + i,
            "steps": steps - steps // 2 + 7919 * i % (steps // 2 * 2 + 1),
            "width": side,
            "height": side,
        }
        for i in range(count)
    ]


class Alone:
    """The engine in a process of its own."""

    def __init__(self, threads: int, stack: ExitStack) -> None:
        command = [sys.executable, "-m", "benchmarks.service_engine"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)
        )
        stack.callback(self._process.kill)
        self._tell(str(threads))
        assert self._hear() == "ready"

    def draw(self, jobs: Sequence[Mapping[str, Any]]) -> Run:
        """All of them at once: the packer chooses."""
        self._tell(json.dumps(jobs))
        return Run(*json.loads(self._hear()))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Service:
    """A worker on one lane, and a producer."""

    def __init__(self, lane: str, settings: Settings, threads: int, held: int, stack: ExitStack) -> None:
        log = settings.home.parent / f"{lane}-{threads}.log"
        command = ["-m", "worker", "--no-supervisor", "--device", "cpu", "--threads", str(threads)]
        command += ["--concurrency", str(held)]
        self._worker = stack.enter_context(process(command, settings, log))
        self._client = stack.enter_context(Client(settings))
        self._batches = 0
        wait_until(has_line(log, " ready:"), "a ready worker", log)

    def draw(self, jobs: Sequence[Mapping[str, Any]]) -> Run:
        """From the submit until the last one is shown, on the database's clock."""
        own, beside = cpu_s(self._worker.pid), _servers_cpu_s()
        self._batches += 1
        batch = self._client.batch(f"run {self._batches}")
        self._client.submit_many(jobs, batch=batch.name)
        while batch.counts()[State.succeeded] < len(jobs):
            assert not batch.counts()[State.failed]
            time.sleep(0.25)
        used = cpu_s(self._worker.pid) - own, _servers_cpu_s() - beside
        views = batch.jobs()
        began = min(view.created_at for view in views)
        ended = max(view.finished_at for view in views if view.finished_at)
        claimed = min(view.started_at for view in views if view.started_at)
        return Run((ended - began).total_seconds(), *used, (claimed - began).total_seconds())


def _servers_cpu_s() -> float:
    """Of our children that are servers: PostgreSQL's processes, Redis, rclone."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/comm").read_text().strip() for child in children}
    return sum(
        family_cpu_s(pid) if name == "postgres" else cpu_s(pid)
        for pid, name in names.items()
        if name in ("postgres", "redis-server", "rclone")
    )


class Bench:
    """Both lanes and the engine alone, for each number of threads."""

    def __init__(self, folder: Path, stack: ExitStack, threads: Sequence[int], held: int) -> None:
        self._folder, self._stack, self._held = folder, stack, held
        self._file = lanes.migrated_file(folder)
        self._postgres = stack.enter_context(servers.postgres_server())
        self._database = lanes.migrated_database(self._postgres)
        s3 = stack.enter_context(servers.rclone_s3())
        lanes.make_bucket(s3)
        os.environ.update(s3.environment)
        self.ways = {number: self._ways(number) for number in threads}

    def _ways(self, threads: int) -> dict[str, Alone | Service]:
        made: dict[str, Alone | Service] = {"engine alone": Alone(threads, self._stack)}
        for lane in LANES:
            folder = self._folder / f"{lane}-{threads}"
            folder.mkdir()
            made[lane] = Service(lane, self._settings(lane, folder), threads, self._held, self._stack)
        return made

    def _settings(self, lane: str, folder: Path) -> Settings:
        if lane == "embedded":
            return lanes.embedded(folder, self._file)
        redis = self._stack.enter_context(servers.redis_server())  # one each, so that no worker hears another's bells
        return self._stack.enter_context(lanes.production(folder, self._postgres, self._database, redis))

    def measure(self, count: int, steps: int, side: int, rounds: int) -> dict[str, Any]:
        """In turn, so that what else the machine does hits all of them; the first jobs of each warm it up."""
        runs: dict[int, dict[str, list[Run]]] = {number: defaultdict(list) for number in self.ways}
        for number, ways in self.ways.items():
            for way in ways.values():
                way.draw(jobs_of(2, 2, side, 0))
            for round_ in range(rounds):
                for name, way in ways.items():
                    runs[number][name].append(way.draw(jobs_of(count, steps, side, 1000 * round_)))
        return {f"{number}_threads": account(found, count) for number, found in runs.items()}


def account(runs: Mapping[str, Sequence[Run]], count: int) -> dict[str, Any]:
    """Rates, each lane's efficiency in each round, and where the milliseconds of a job went."""
    alone = runs["engine alone"]
    told: dict[str, Any] = {
        "images_per_s": {name: spread([count / run.wall_s for run in found], 4) for name, found in runs.items()}
    }
    for lane in LANES:
        pairs = list(zip(runs[lane], alone, strict=True))
        lost = [run.wall_s - bare.wall_s for run, bare in pairs]
        told[lane] = {
            "efficiency": spread([bare.wall_s / run.wall_s for run, bare in pairs], 4),
            "lost_ms_per_job": spread([1e3 * seconds / count for seconds in lost], 2),
            "servers_cpu_ms_per_job": _ms([run.servers_cpu_s for run in runs[lane]], count),
            "worker_cpu_besides_engine_ms_per_job": _ms([run.own_cpu_s - bare.own_cpu_s for run, bare in pairs], count),
            "first_claim_ms": _ms([run.first_claim_s for run in runs[lane]], 1),
        }
    return told


def _ms(seconds: Sequence[float], count: int) -> float:
    return round(1e3 * statistics.median(seconds) / count, 2)


def goals(measured: Mapping[str, Any]) -> list[Goal]:
    """The issue's goal, for each lane and number of threads."""
    found = []
    for threads, told in measured.items():
        for lane in LANES:
            row = told[lane]
            why = (
                f"{row['lost_ms_per_job']['median']} ms a job are lost; CPU of the servers "
                f"{row['servers_cpu_ms_per_job']} ms, of the worker besides the engine "
                f"{row['worker_cpu_besides_engine_ms_per_job']} ms"
            )
            name = f"{lane}, engine with {threads.replace('_', ' ')}: of the bare engine's images/s, >= 0.97"
            found.append(at_least(name, row["efficiency"]["median"], 0.97, why))
    return found


def table(measured: Mapping[str, Any], reached: Sequence[Goal]) -> str:
    """The result in words."""
    lines = []
    for threads, told in measured.items():
        for name, rate in told["images_per_s"].items():
            lines.append(f"{threads}  {name:13}{rate['median']:8.3f} images/s ({rate['least']} - {rate['most']})")
        for lane in LANES:
            shown = {what: value for what, value in told[lane].items() if not isinstance(value, dict)}
            lost, share = told[lane]["lost_ms_per_job"], told[lane]["efficiency"]
            lines.append(f"{threads}  {lane:13}{share['median']:8.3f} of it ({share['least']} - {share['most']})")
            lines.append(f"    lost {lost['median']} ms a job; {shown}")
    return "\n".join([*lines, *(goal.line for goal in reached)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=64, help="of one run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a job on average (default: %(default)s)")
    parser.add_argument("--side", type=int, default=96, help="pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument(
        "--concurrency",
        type=int,
        default=48,
        help="jobs that a worker holds (default: %(default)s; more at once draw so small pictures no faster)",
    )
    both = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", default=",".join(map(str, both)), help="of the engine (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two short jobs, one thread, one round")
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS / "service.json", help="JSON; the plot lies beside it"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.jobs, options.steps, options.rounds, options.threads = 2, 2, 1, "1"
    threads = [int(number) for number in options.threads.split(",")]
    with tempfile.TemporaryDirectory(prefix="nightshift-service-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack, threads, options.concurrency)
        measured = bench.measure(options.jobs, options.steps, options.side, options.rounds)
    reached = goals(measured)
    print(table(measured, reached))
    about = {name: getattr(options, name) for name in ("jobs", "steps", "side", "rounds", "concurrency")}
    about["servers"] = "SQLite, synchronous=NORMAL; PostgreSQL, fsync=off; Redis; S3 by rclone; all on this machine"
    report.write(options.out, about | {"measured": measured, "goals": as_json(reached)}, beside=("celery", "boto3"))
    plots.bars(
        options.out.with_suffix(".png"),
        "Images a second over those of the engine alone",
        "share",
        {f"{lane}, {name}": told[lane]["efficiency"]["median"] for name, told in measured.items() for lane in LANES},
    )


if __name__ == "__main__":
    main()
