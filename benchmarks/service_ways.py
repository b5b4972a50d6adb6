"""The ways of `benchmarks.service`: the engine alone, and whole services with a worker; both are told the same jobs."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale_fleet import cpu_s, family_cpu_s
from benchmarks.service_turns import Stretch
from jobs import Batch, Client, Settings, State
from tests import servers
from tests.faults import lanes
from tests.integration.processes import ROOT, has_line, process, tail, wait_until

LANES = lanes.LANES
ALONE, AGAIN = "engine alone", "engine again"
MINI = "nightshift-mini"
COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("star", "circle", "square", "triangle")


@dataclass(frozen=True, slots=True)
class DrawnWith:
    """What all ways draw with: the model's name and its folder ("shipped": that of the package), and the dtype."""

    model: str = MINI
    folder: str = "shipped"
    dtype: str = "fp32"


def jobs_of(count: int, steps: int, side: int, seed: int, model: str = MINI) -> list[dict[str, Any]]:
    """So many different jobs, as both sides take them.

    Their steps differ by up to a half either way, as those of a night do: else all would be stored in one moment, while
    the engine has nothing to draw.
    """
    return [
        {
            "model": model,
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

    def __init__(self, drawing: DrawnWith, threads: int, stack: ExitStack) -> None:
        command = [sys.executable, "-m", "benchmarks.service_engine"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)
        )
        stack.callback(self._process.kill)
        self._tell(json.dumps({"threads": threads, **asdict(drawing)}))
        assert self._hear() == "ready"

    @property
    def pid(self) -> int:
        return self._process.pid

    def begin(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """All of them at once: the packer chooses."""
        self._tell(json.dumps(jobs))

    def ended(self) -> Stretch | None:
        """When the engine had drawn them all."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 0)[0]:
            return None
        began, ended = json.loads(self._hear())
        return Stretch(began, began, ended)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


class Service:
    """A worker on one lane, and a producer."""

    def __init__(self, lane: str, settings: Settings, threads: int, options: Sequence[str], stack: ExitStack) -> None:
        log = settings.home.parent / f"{lane}-{threads}.log"
        command = ["-m", "worker", "--no-supervisor", "--device", "cpu", "--threads", str(threads)]
        command += options
        self._worker = stack.enter_context(process(command, settings, log))
        self.client = stack.enter_context(Client(settings))
        self.log = log
        self._batches = self._wanted = 0
        self._batch: Batch | None = None
        wait_until(has_line(log, " ready:"), "a ready worker", log)

    @property
    def pid(self) -> int:
        return self._worker.pid

    def draw(self, jobs: Sequence[Mapping[str, Any]]) -> float:
        """Seconds from the submit until the last one is stored, on the database's clock."""
        self.begin(jobs)
        while (stretch := self.ended()) is None:
            time.sleep(0.25)
        return stretch.ended - stretch.began

    def begin(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Submit them as a batch of their own."""
        self._batches += 1
        self._batch, self._wanted = self.client.batch(f"run {self._batches}"), len(jobs)
        self.client.submit_many(jobs, batch=self._batch.name)

    def ended(self) -> Stretch | None:
        """When all were stored, on the database's clock."""
        assert self._batch is not None
        assert self._worker.poll() is None, tail(self.log)
        counts = self._batch.counts()
        assert not counts[State.failed], tail(self.log)
        if counts[State.succeeded] < self._wanted:
            return None
        views = self._batch.jobs()
        assert not any(view.suspect for view in views), "a lease was lost"
        return Stretch(
            min(view.created_at.timestamp() for view in views),
            min(view.started_at.timestamp() for view in views if view.started_at),
            max(view.finished_at.timestamp() for view in views if view.finished_at),
        )


def servers_cpu_s() -> float:
    """Of our children that are servers: PostgreSQL's processes, Redis, rclone."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/comm").read_text().strip() for child in children}
    return sum(
        family_cpu_s(pid) if name == "postgres" else cpu_s(pid)
        for pid, name in names.items()
        if name in ("postgres", "redis-server", "rclone")
    )


class Bench:
    """Servers, and on them both lanes and the engine alone. options: of every worker's command; drawing:
    with the shipped model where none is given."""

    def __init__(
        self, folder: Path, stack: ExitStack, options: Sequence[str], drawing: DrawnWith | None = None
    ) -> None:
        self.drawing = drawing or DrawnWith()
        self._folder, self._options = folder, [*options, "--dtype", self.drawing.dtype]
        self._file = lanes.migrated_file(folder)
        self._postgres = stack.enter_context(servers.postgres_server())
        self._database = lanes.migrated_database(self._postgres)
        s3 = stack.enter_context(servers.rclone_s3())
        lanes.make_bucket(s3)
        os.environ.update(s3.environment)

    @contextmanager
    def service(self, lane: str, threads: int) -> Iterator[Service]:
        """A ready worker with so many threads, on a fresh place; killed at the end."""
        with ExitStack() as stack:
            folder = self._folder / f"{lane}-{threads}"
            folder.mkdir()
            yield Service(lane, self._settings(lane, folder, stack), threads, self._options, stack)

    @contextmanager
    def ways(self, threads: int) -> Iterator[dict[str, Alone | Service]]:
        """The engine alone, twice: the second tells how far two equal ways come out apart; and both services."""
        with ExitStack() as stack:
            made: dict[str, Alone | Service] = {ALONE: Alone(self.drawing, threads, stack)}
            made |= {lane: stack.enter_context(self.service(lane, threads)) for lane in LANES}
            yield made | {AGAIN: Alone(self.drawing, threads, stack)}

    def _settings(self, lane: str, folder: Path, stack: ExitStack) -> Settings:
        return self._servers_of(lane, folder, stack).model_copy(
            update={"models": {self.drawing.model: self.drawing.folder}}
        )

    def _servers_of(self, lane: str, folder: Path, stack: ExitStack) -> Settings:
        if lane == "embedded":
            return lanes.embedded(folder, self._file)
        redis = stack.enter_context(servers.redis_server())  # one each, so that no worker hears another's bells
        return stack.enter_context(lanes.production(folder, self._postgres, self._database, redis))
