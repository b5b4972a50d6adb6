"""A long night under a random mix of faults: what row 53 does to it, and what it writes down meanwhile."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from jobs.errors import JobConflict
from tests.faults.brokers import OwnRedis, look
from tests.faults.harness import SLACK_S, Guardian, Night
from tests.faults.s3_stub import FaultyS3

#: Rows 23 and 24 from the inside: commits that were applied and got no answer, beats that found no database.
FAILPOINT = "after_finish_commit:raise@p=0.01;heartbeat:raise@p=0.01;before_claim_commit:raise@p=0.005"
#: Jobs that a worker holds at once, so the most that one loss of it may let be computed again.
HELD = 8
#: Of so many jobs one is poison.
POISON_IN = 1000
#: Jobs submitted together, of which half are cancelled in the next second.
CANCEL_AMONG = 12
SAMPLE_S = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A worker process at a moment. age_s: since it was first looked at."""

    pid: int
    age_s: float
    rss_mb: float
    threads: int


@dataclass(slots=True)
class Life:
    """What one worker process weighed while it lived."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def lasted_s(self) -> float:
        return self.samples[-1].age_s

    def summary(self) -> dict[str, Any]:
        """The medians of its first and last minute, or thirds when it was shorter; the first seconds are its start."""
        settled = [sample for sample in self.samples if sample.age_s >= SAMPLE_S] or self.samples
        share = max(1, min(round(60 / SAMPLE_S), len(settled) // 3))
        first, last = settled[:share], settled[-share:]
        return {
            "lasted_s": round(self.lasted_s),
            "rss_mb_start": round(median(sample.rss_mb for sample in first), 1),
            "rss_mb_end": round(median(sample.rss_mb for sample in last), 1),
            "rss_mb_by_tenths": [round(settled[i * (len(settled) - 1) // 10].rss_mb, 1) for i in range(11)],
            "threads_start": round(median(sample.threads for sample in first)),
            "threads_end": round(median(sample.threads for sample in last)),
        }


class Watch:
    """Memory and threads of worker processes, from /proc."""

    def __init__(self) -> None:
        self.lives: dict[int, Life] = {}
        self._born: dict[int, float] = {}

    def look(self, pid: int) -> None:
        """Take a sample of this process, if it lives."""
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "VmRSS" not in fields:  # it has ended and nobody has asked for its status yet
            return
        now = time.monotonic()
        age_s = now - self._born.setdefault(pid, now)
        sample = Sample(pid, age_s, int(fields["VmRSS"].split()[0]) / 1024, int(fields["Threads"]))
        self.lives.setdefault(pid, Life()).samples.append(sample)

    def longest(self) -> Life:
        """The process that lived longest."""
        return max(self.lives.values(), key=lambda life: life.lasted_s)


class Chaos:
    """Faults by the number of their row in the table. All of them are over when their call returns, or healed by
    `calm`. `spared`: the last worker gets no more signals, so that its memory and threads can be compared."""

    def __init__(self, night: Night, guardian: Guardian, broker: OwnRedis, storage: FaultyS3) -> None:
        self._night, self._guardian, self._broker, self._storage = night, guardian, broker, storage
        self._rng = night.rng
        self.spared = False
        self.happened: Counter[int] = Counter()
        self.cancelled: set[UUID] = set()
        self.faults: Mapping[int, Callable[[], None]] = {
            1: self.kill,
            8: self.terminate,
            12: self.stop_and_wake,
            14: self.restart_broker,
            15: self.cut_broker,
            23: self.cut_database,
            31: self.slow_storage,
            41: self.cancel,
        }

    def strike(self) -> int:
        """One fault, drawn by the night's seed. The number of its row."""
        row = self._rng.choice(list(self.faults))
        self.faults[row]()
        self.happened[row] += 1
        return row

    def calm(self) -> None:
        """Nothing is wrong with the servers any more."""
        self._storage.heal()

    def duplicates(self, poison: int) -> int:
        """Pictures that these faults may have let be computed again: each job that a worker held when it was lost."""
        workers = len(self._guardian.workers)
        lost_workers = sum(self.happened[row] for row in (1, 8, 12)) + 4 * poison
        return HELD * (lost_workers + workers * (self.happened[14] + self.happened[15] + self.happened[23]) + workers)

    def _signal(self, *numbers: int, pause_s: float = 0.0) -> None:
        workers = self._guardian.workers
        worker = self._rng.choice(workers[:-1] if self.spared else workers)
        for number in numbers:
            worker.kill(number)
            time.sleep(pause_s)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def stop_and_wake(self) -> None:
        lease_s = self._guardian.workers[0].options["lease_s"]
        self._signal(signal.SIGSTOP, signal.SIGCONT, pause_s=self._rng.uniform(1.0, 2.5) * lease_s)

    def restart_broker(self) -> None:
        self._broker.shut_down()
        time.sleep(self._rng.uniform(0.2, 2.0))
        self._broker.start()

    def cut_broker(self) -> None:
        with look(self._broker.url) as client:
            client.execute_command("CLIENT", "KILL", "TYPE", self._rng.choice(["normal", "pubsub"]), "SKIPME", "yes")

    def cut_database(self) -> None:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
        with self._night.store.engines.writer.connect() as connection:
            connection.execute(sa.text(f"{others} AND pid <> pg_backend_pid()"))

    def slow_storage(self) -> None:
        self._storage.slow_down(0.5)
        time.sleep(self._rng.uniform(1.0, 4.0))
        self._storage.heal()

    def cancel(self) -> None:
        """Some jobs that were submitted a moment ago, whatever they are doing."""
        fresh = self._night.submit(CANCEL_AMONG, steps=80)
        for job in self._rng.sample(fresh, CANCEL_AMONG // 2):
            time.sleep(self._rng.uniform(0.0, 0.1))
            try:
                self._night.client.cancel(job.id)
            except JobConflict:
                continue
            self.cancelled.add(job.id)


class Supply:
    """Submits the night's jobs evenly over its length; a few of them poison, all in the first half."""

    def __init__(self, night: Night, count: int, seconds: float) -> None:
        self._night, self._count, self._seconds = night, count, seconds
        self._began = time.monotonic()
        self.poison: set[UUID] = set()

    @property
    def share(self) -> float:
        """How much of the night has gone by."""
        return min(1.0, (time.monotonic() - self._began) / self._seconds)

    def catch_up(self) -> None:
        """Submit what should have been submitted by now."""
        missing = min(self._count, 1 + int(self._count * self.share)) - len(self._night.jobs)
        while missing > 0:
            some = min(missing, 25)
            self._submit(some)
            missing -= some

    def _submit(self, count: int) -> None:
        night = self._night
        wanted = max(1, self._count // POISON_IN)
        if self.share < 0.5 and len(self.poison) < wanted and self.share >= 0.5 * len(self.poison) / wanted:
            self.poison.add(night.submit(1, prompt="poison", steps=4)[0].id)
            count -= 1
        if count:
            night.submit(count, steps=night.rng.randint(4, 60), images=night.rng.choice([1, 1, 1, 2]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a soak showed."""

    poison: frozenset[UUID]
    chaos: Chaos
    watch: Watch
    deaths: Counter[int]
    seconds: float

    def as_json(self, night: Night, again: int) -> dict[str, Any]:
        """What is published."""
        states = Counter(str(view.state) for view in night.ended.values())
        drawn = len(night.entries("drawn"))
        return {
            "runner": "fake: a step sleeps 2 ms; leases of 1.5 s in place of 30",
            "seed": night.seed,
            "lane": "PostgreSQL, Redis, S3 (a stub that can fail)",
            "minutes": round(self.seconds / 60, 1),
            "workers": len(self.chaos._guardian.workers),
            "jobs": len(night.jobs),
            "ended": dict(states),
            "lost": len(night.jobs) - sum(states.values()),
            "faults": {str(row): count for row, count in sorted(self.chaos.happened.items())},
            "poison_jobs": len(self.poison),
            "killed_while_alone": sum(bool(view.solo_crashes) for view in night.ended.values()) - len(self.poison),
            "deaths_by_exit_code": {str(code): count for code, count in sorted(self.deaths.items())},
            "pictures_computed": drawn,
            "computed_again": again,
            "computed_again_share": round(again / max(1, drawn), 5),
            "longest_lived_worker": self.watch.longest().summary(),
        }


def soak(night: Night, broker: OwnRedis, storage: FaultyS3, *, seconds: float, jobs: int, workers: int = 2) -> Outcome:
    """A night of `seconds` with so many jobs; returns when all of them have ended in peace."""
    watch, began = Watch(), time.monotonic()
    with Guardian(night, workers, failpoint=FAILPOINT) as guardian:
        chaos, supply = Chaos(night, guardian, broker, storage), Supply(night, jobs, seconds)
        next_sample = 0.0
        while supply.share < 1.0:
            supply.catch_up()
            chaos.spared = supply.share >= 0.5
            row = chaos.strike()
            print(f"{time.monotonic() - began:7.1f} s  fault {row:2}  {len(night.jobs)} jobs", flush=True)
            until = time.monotonic() + night.rng.uniform(0.5, 4.0)
            while time.monotonic() < until:
                supply.catch_up()
                if time.monotonic() >= next_sample:
                    next_sample = time.monotonic() + SAMPLE_S
                    night.all_ended()  # what has ended is remembered, and must be the same in the end
                    for worker in list(guardian.workers):
                        watch.look(worker.pid)
                time.sleep(0.1)
        supply.catch_up()
        chaos.calm()
        _wait_ended(night, watch, guardian)
    return Outcome(frozenset(supply.poison), chaos, watch, Counter(guardian.deaths), time.monotonic() - began)


def _wait_ended(night: Night, watch: Watch, guardian: Guardian) -> None:
    """Look seldom: each look asks for the state of all jobs."""
    patience_s = 60.0 + SLACK_S + 0.02 * len(night.jobs)
    deadline = time.monotonic() + patience_s
    while night.store.unfinished() and time.monotonic() < deadline:
        for worker in list(guardian.workers):
            watch.look(worker.pid)
        time.sleep(1.0)
    night.wait_ended()
