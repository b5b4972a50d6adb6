"""A night: a fresh database, broker and storage, jobs, and real worker processes with the fake runner.

Time is scaled: leases of 1.5 s instead of 30, a beat every third of it, a grace time of 3 s instead of 25. Every bound
in a row is computed from these, with `SLACK_S` for a machine that does other things too.
"""

from __future__ import annotations

import random
import resource
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar
from uuid import UUID

import sqlalchemy as sa

from jobs import Client, JobView, State
from jobs.failpoints import VARIABLE
from jobs.models import job as job_table
from jobs.states import TERMINAL
from jobs.storage import Storage, open_storage
from jobs.store import Store
from tests.faults.fake_runner import Entry, read_tally
from tests.faults.lanes import Place
from tests.faults.zygote import Forked
from worker.process import Options

Choice = TypeVar("Choice")

#: Longest wait for what must happen; never reached when all is well.
PATIENCE_S = 120.0
#: For two cores that run four nights at once.
SLACK_S = 6.0
#: `worker.process.Options` of every worker, unless a row says otherwise.
OPTIONS: Mapping[str, Any] = MappingProxyType(
    {"concurrency": 8, "lease_s": 1.5, "beat_s": 0.5, "poll_s": 0.1, "grace_s": 3.0}
)
#: For rows in which no lease may end: a loaded machine must not end it either.
CALM: Mapping[str, Any] = MappingProxyType({"lease_s": 12.0, "beat_s": 1.0})
#: Between two looks of a test that waits: each costs the database and the cores that the workers need.
LONGEST_PAUSE_S = 0.03
#: The same where nothing is to happen at that very moment.
UNHURRIED_PAUSE_S = 0.1
STEPS = 8


class Worker:
    """One worker process."""

    def __init__(self, night: Night, process: Forked, options: Mapping[str, Any]) -> None:
        self.night, self.process, self.options = night, process, options

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> Worker:
        """Itself, once it hears bells."""
        self.night.wait_until(
            lambda: self.says(" ready:") or self.process.poll() is not None,
            "a ready worker",
            longest_pause_s=UNHURRIED_PAUSE_S,
        )
        assert self.process.poll() is None, f"the worker ended with {self.process.code}\n{self.night.tail()}"
        return self

    def says(self, text: str) -> bool:
        """Whether one of its announcements ("worker host:pid:uuid ...") holds the text."""
        return any(f":{self.pid}:" in line and text in line for line in self.night.log_text().splitlines())

    def holds(self) -> list[UUID]:
        """Its running jobs, as the database has it."""
        return [id for id, owner in self.night.owners(State.running).items() if f":{self.pid}:" in owner]

    def back_within_s(self) -> float:
        """If it died: until its jobs are back in the queue, after its lease and a round of somebody's sweeper."""
        return float(1.25 * self.options["lease_s"]) + SLACK_S

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; `wait` tells when it has ended."""
        self.process.kill(number)

    def put_to_sleep(self) -> None:
        """SIGSTOP, but not within a transaction: SQLite's lock would keep all others out until it wakes."""
        self.kill(signal.SIGSTOP)
        while self.night.locked():
            self.kill(signal.SIGCONT)
            time.sleep(0.01)
            self.kill(signal.SIGSTOP)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        """The exit code, negative for a signal. Raises TimeoutError."""
        return self.process.wait(timeout)

    def stop(self, *numbers: int, code: int = 0) -> float:
        """SIGTERM (or these signals, one after the other), and the promise that goes with it: gone within the grace
        time, with this code. The seconds that it took."""
        self.ready()  # one that is told so before it listens to signals ends at once, and owes nobody anything
        began = time.monotonic()
        for number in numbers or (signal.SIGTERM,):
            self.kill(number)
        assert self.wait() == code, f"exit code {self.process.code}, not {code}\n{self.night.tail()}"
        took = time.monotonic() - began
        assert took <= self.options["grace_s"] + SLACK_S, f"left after {took:.1f} s\n{self.night.tail()}"
        return took


class Night:
    """One run of one row. Leaving the block kills what still runs."""

    def __init__(self, place: Place, seed: int, folder: Path, *, acks_late: bool = True) -> None:
        self.place, self.seed, self.folder = place, seed, folder
        self.settings = place.settings
        self.rng = random.Random(seed)
        self.log, self.tally = folder / "night.log", folder / "tally"
        self.jobs: list[JobView] = []
        self.ended: dict[UUID, JobView] = {}  # each as it was when it was first seen to have ended
        self.workers: list[Worker] = []
        self.processes: list[Forked] = []
        self._defaults = {**OPTIONS, "acks_late": acks_late}

    @property
    def lane(self) -> str:
        return self.place.lane

    @cached_property
    def client(self) -> Client:
        """Of the test itself, past every proxy."""
        return Client(self.settings)

    @cached_property
    def store(self) -> Store:
        """Of the test itself, past every proxy."""
        return Store.open(self.settings.database_url)

    def turn(self, choices: Sequence[Choice]) -> Choice:
        """One of them; another one for the next seed, so that the seeds of a row share them out."""
        return choices[(self.seed - 1) % len(choices)]

    @cached_property
    def storage(self) -> Storage:
        """Of the test itself, past every proxy."""
        return open_storage(self.settings.storage_url)

    # Jobs

    def specs(self, count: int, *, prompt: str = "job", **fields: Any) -> list[dict[str, Any]]:
        """So many different specs. Their seeds are the night's own; no two pictures of a night are the same."""
        first = len(self.jobs)
        plain = {"steps": STEPS, "guidance": None, "sampler": "euler", "width": 64, "height": 64}
        return [
            plain | {"prompt": f"{prompt} {first + i}", "seed": self.rng.randrange(2**31)} | fields
            for i in range(count)
        ]

    def submit(self, count: int, **fields: Any) -> list[JobView]:
        """Submit so many jobs; `fields` of their specs."""
        views = self.client.submit_many(self.specs(count, **fields), batch="night")
        self.jobs += views
        return views

    def adopt(self) -> list[JobView]:
        """All jobs that the database has, whoever submitted them."""
        self.jobs = self.client.jobs()[::-1]
        return self.jobs

    def views(self) -> dict[UUID, JobView]:
        """The night's jobs as they are now."""
        return {view.id: view for view in self.client.jobs(batch="night")}

    def states(self) -> dict[UUID, State]:
        """Their states as they are now."""
        return self.store.states([job.id for job in self.jobs])

    def locked(self) -> bool:
        """Whether somebody has SQLite's lock for writing just now; PostgreSQL has none that all wait for."""
        path = sa.make_url(self.settings.database_url).database
        if self.lane != "embedded" or path is None:
            return False
        with closing(sqlite3.connect(path, timeout=0.0, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            return False

    def owners(self, *states: State) -> dict[UUID, str]:
        """The worker that claimed each job last; of jobs in these states."""
        chosen = sa.select(job_table.c.id, job_table.c.worker_id).where(job_table.c.state.in_(states))
        with self.store.engines.reader.connect() as connection:
            return {row.id: str(row.worker_id) for row in connection.execute(chosen)}

    # Processes

    def environment(self, failpoint: str = "", **more: str) -> dict[str, str]:
        """What makes another process use this night; `more` wins."""
        settings = self.settings
        urls = {name: getattr(settings, name) for name in ("home", "database_url", "broker_url", "storage_url")}
        ours = {f"NIGHTSHIFT_{name.upper()}": str(value) for name, value in urls.items()}
        return self.place.aws | ours | ({VARIABLE: failpoint} if failpoint else {}) | more

    def worker(self, **how: Any) -> Worker:
        """Start a worker: `failpoint`, `environment`, fields of `worker.process.Options`, arguments of the fake runner
        (`step_s`, `oom_rows`), and any of `targets.worker`."""
        given = self.worker_arguments(**how)
        process = self.place.zygote.fork("worker", given["environment"], self.log, **given["arguments"])
        worker = Worker(self, process, given["arguments"]["options"])
        self.workers.append(worker)
        return worker

    def worker_arguments(
        self, *, failpoint: str = "", environment: Mapping[str, str] = MappingProxyType({}), **how: Any
    ) -> dict[str, Any]:
        """What a worker process is given: its environment, its log and the arguments of `targets.worker`."""
        options = {field.name: how.pop(field.name) for field in fields(Options) if field.name in how}
        fake = {"step_s": 0.002} | {name: how.pop(name) for name in ("step_s", "oom_rows") if name in how}
        arguments = {"options": self._defaults | options, "tally": str(self.tally), "fake": fake, **how}
        return {"environment": self.environment(failpoint, **environment), "log": str(self.log), "arguments": arguments}

    def fork(self, target: str, *, failpoint: str = "", **arguments: Any) -> Forked:
        """Another process of this night: `targets.<target>`."""
        process = self.place.zygote.fork(target, self.environment(failpoint), self.log, **arguments)
        self.processes.append(process)
        return process

    def alive(self) -> list[Worker]:
        """Workers that run now."""
        return [worker for worker in self.workers if worker.process.poll() is None]

    # Waiting and looking

    def wait_until(
        self,
        happened: Callable[[], object],
        what: str,
        timeout: float = PATIENCE_S,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        """Look again and again; fails with the end of the log."""
        deadline, pause_s = time.monotonic() + timeout, 0.005
        while not happened():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen within {timeout:.1f} s (seed {self.seed})\n{self.tail()}")
            time.sleep(pause_s)
            pause_s = min(1.2 * pause_s, longest_pause_s)

    def wait_running(self, count: int = 1) -> list[UUID]:
        """The jobs in state running, once there are so many."""
        self.wait_until(lambda: self.client.counts()[State.running] >= count, f"{count} running jobs")
        return [view.id for view in self.client.jobs(state=State.running)]

    def wait_steps(self, jobs: Collection[JobView]) -> None:
        """Until the engine of some worker has taken in a row of each of these jobs."""
        wanted = {job.spec.prompt for job in jobs}
        self.wait_until(lambda: wanted <= {entry.prompt for entry in self.entries()}, "rows of all these jobs")

    def wait_ended(self, timeout: float = PATIENCE_S) -> dict[UUID, JobView]:
        """All jobs of the night, once each has ended (I1)."""
        self.wait_until(self.all_ended, f"the end of {len(self.jobs)} jobs", timeout, UNHURRIED_PAUSE_S)
        return dict(self.ended)

    def all_ended(self) -> bool:
        """Whether each job of the night has."""
        fresh = [id for id, state in self.states().items() if state in TERMINAL and id not in self.ended]
        for start in range(0, len(fresh), 500):
            self.ended |= {view.id: view for view in self.client.jobs(ids=fresh[start : start + 500])}
        return len(self.ended) >= len(self.jobs)

    def entries(self, what: str = "") -> list[Entry]:
        """The tally so far; `what`: only those lines."""
        return [entry for entry in read_tally(self.tally) if what in ("", entry.what)]

    def log_text(self) -> str:
        """What all processes of the night have written."""
        return self.log.read_text("utf-8", errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 60) -> str:
        """The end of that."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def __enter__(self) -> Night:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        processes = [*self.processes, *(worker.process for worker in self.workers)]
        for process in processes:
            process.kill(signal.SIGKILL)
        for process in processes:
            process.wait()
        for opened in ("client", "store"):
            if opened in self.__dict__:
                self.__dict__[opened].close()


class Guardian(threading.Thread):
    """Starts a worker again when one has died, as a supervisor does, and keeps the codes of the dead.

    kill_above_bytes: it also kills a process that holds more than this, as the kernel of a full machine does.
    """

    def __init__(self, night: Night, count: int, *, kill_above_bytes: int | None = None, **how: Any) -> None:
        super().__init__(name="guardian", daemon=True)
        self._night, self._how, self._most = night, how, kill_above_bytes
        self._left = threading.Event()
        self.deaths: list[int] = []
        self.workers = [night.worker(**how) for _ in range(count)]

    def run(self) -> None:
        while not self._left.wait(0.02):
            for i, worker in enumerate(self.workers):
                code = worker.process.poll()
                if code is None and self._most is not None and _resident_bytes(worker.pid) > self._most:
                    worker.kill()
                if code is not None and not self._left.is_set():
                    self.deaths.append(code)
                    self.workers[i] = self._night.worker(**self._how)

    def __enter__(self) -> Guardian:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self.join()


def _resident_bytes(pid: int) -> int:
    """What the process holds in memory now; 0 when it has ended."""
    try:
        return resource.getpagesize() * int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
