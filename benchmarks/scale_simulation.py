"""A thousand GPU workers that nobody has: what they ask of one PostgreSQL and one Redis, event by event.

The prices are measured (`benchmarks.scale_fleet`), the rest is queueing: PostgreSQL is a few cores that take statements
in their order, Redis is one. A worker keeps twice as many jobs as its GPU draws together, as ours do, so a database
that answers late costs nothing until what it has in hand runs out.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.sweeper import WITH_BROKER

#: Seconds between two of the things that a worker asks by the clock (`worker.sweeper`, `worker.heartbeat`), at most:
#: the ringer asks what is due while there is room for it, the lookout while there is none (sooner where urgent bells
#: wait, which here do not).
PERIODS: Mapping[str, float] = {
    "heartbeat": 10.0,
    "cancel_poll": 1.0,
    "sweep": WITH_BROKER.sweep_s,
    "due": WITH_BROKER.idle_s,
    "lookout": WITH_BROKER.lookout_s,
}


@dataclass(frozen=True, slots=True)
class Prices:
    """Milliseconds of CPU by statement, and per job; `other_ms`: what a job costs PostgreSQL besides its claim and its
    finish (new connections, looks for cancels). `rarely`: how many times its price a statement costs that is asked by
    the clock: one alone is priced by hundreds in a row, and with a look whether the connection still answers, and with
    cold caches, it takes more. `redis_clock_ms`: Redis' CPU a second, of what a worker asks it by the clock (most of it
    whether urgent bells wait). Connections and clients of one worker."""

    statements_ms: Mapping[str, float]
    other_ms: float
    redis_ms: float
    connections: float
    broker_clients: float
    rarely: float = 1.0
    redis_clock_ms: float = 0.0

    @property
    def clock_ms(self) -> float:
        """PostgreSQL's CPU a second, of what one worker asks by the clock, at most."""
        return self.asked_ms(*PERIODS)

    def asked_ms(self, *names: str) -> float:
        """Of some of it."""
        return self.rarely * sum(self.statements_ms[what] / PERIODS[what] for what in names)

    @property
    def job_ms(self) -> float:
        """PostgreSQL's CPU of a job."""
        return self.statements_ms["claim"] + self.statements_ms["finish"] + self.other_ms


@dataclass(frozen=True, slots=True)
class House:
    """The machines. jobs_per_s: what one GPU draws when nothing keeps it waiting; pack: rows drawn together."""

    prices: Prices
    jobs_per_s: float = 1.0
    pack: int = 8
    database_cores: int = 8
    max_connections: int = 100
    max_clients: int = 10_000


@dataclass(slots=True)
class Server:
    """A few cores and one queue."""

    cores: int
    busy: int = 0
    worked_s: float = 0.0
    waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one size of the fleet. efficiency: jobs drawn, of those that the GPUs could have drawn; late: 99 % of the
    statements of this kind were answered within so many seconds."""

    workers: int
    efficiency: float
    database_busy: float
    broker_busy: float
    claim_late_s: float
    heartbeat_late_s: float


class Simulation:
    """One fleet for a while; the queue never runs empty."""

    def __init__(self, house: House, workers: int, rng: random.Random) -> None:
        self._house, self._workers, self._rng = house, workers, rng
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order, self._now = itertools.count(), 0.0
        self._database, self._broker = Server(house.database_cores), Server(1)
        self._late: dict[str, list[float]] = {"claim": [], "heartbeat": []}
        self._ready, self._drawing = [0] * workers, [0] * workers
        self._drawn = 0

    def run(self, warm_s: float, seconds: float) -> Outcome:
        """What happens in `seconds`, after a start of `warm_s`."""
        for worker in range(self._workers):
            for what, period in PERIODS.items():
                self._at(self._rng.uniform(0.0, period), self._by_clock(what, period))
            self._at(self._rng.uniform(0.0, 1.0), self._listening())
            for _ in range(2 * self._house.pack):
                self._at(self._rng.uniform(0.0, warm_s / 2), self._fetcher(worker))
        self._until(warm_s)
        drawn, database, broker = self._drawn, self._database.worked_s, self._broker.worked_s
        for late in self._late.values():
            late.clear()
        self._until(warm_s + seconds)
        possible = self._workers * self._house.jobs_per_s * seconds
        return Outcome(
            self._workers,
            round((self._drawn - drawn) / possible, 3),
            round((self._database.worked_s - database) / seconds / self._database.cores, 3),
            round((self._broker.worked_s - broker) / seconds, 3),
            _p99(self._late["claim"], seconds),
            _p99(self._late["heartbeat"], seconds),
        )

    # A worker

    def _fetcher(self, worker: int) -> Callable[[], None]:
        """A place of the worker that is free: hear a bell, claim, wait for the GPU, be drawn, finish, begin again."""
        prices = self._house.prices

        def fetch() -> None:
            self._ask(self._broker, prices.redis_ms, claim)

        def claim() -> None:
            self._statement("claim", arrived, prices.other_ms)

        def arrived() -> None:
            self._ready[worker] += 1
            self._draw(worker, finish)

        def finish() -> None:
            self._statement("finish", fetch)

        return fetch

    def _draw(self, worker: int, then: Callable[[], None]) -> None:
        """Take a place on the GPU when one is free; who draws at the end draws for all that wait."""
        house = self._house
        if not self._ready[worker] or self._drawing[worker] >= house.pack:
            return
        self._ready[worker] -= 1
        self._drawing[worker] += 1

        def drawn() -> None:
            self._drawing[worker] -= 1
            self._drawn += 1
            then()
            self._draw(worker, then)

        self._at(self._now + house.pack / house.jobs_per_s * self._rng.uniform(0.9, 1.1), drawn)

    def _by_clock(self, what: str, period: float) -> Callable[[], None]:
        prices = self._house.prices
        more_ms = (prices.rarely - 1.0) * prices.statements_ms[what]

        def tick() -> None:
            self._statement(what, lambda: self._at(self._now + period, tick), more_ms)

        return tick

    def _listening(self) -> Callable[[], None]:
        """What a worker asks Redis in a second, at once."""

        def tick() -> None:
            self._ask(self._broker, self._house.prices.redis_clock_ms, lambda: self._at(self._now + 1.0, tick))

        return tick

    # A server

    def _statement(self, what: str, then: Callable[[], None], more_ms: float = 0.0) -> None:
        asked = self._now

        def answered() -> None:
            if what in self._late:
                self._late[what].append(self._now - asked)
            then()

        self._ask(self._database, self._house.prices.statements_ms[what] + more_ms, answered)

    def _ask(self, server: Server, cost_ms: float, then: Callable[[], None]) -> None:
        # Exponential: a statement that finds its page in memory, and one that waits for a lock, are not the same.
        server.waiting.append((self._rng.expovariate(1.0) * cost_ms / 1e3, then))
        self._serve(server)

    def _serve(self, server: Server) -> None:
        while server.waiting and server.busy < server.cores:
            lasts_s, then = server.waiting.popleft()
            server.busy += 1
            self._at(self._now + lasts_s, self._answer(server, lasts_s, then))

    def _answer(self, server: Server, lasted_s: float, then: Callable[[], None]) -> Callable[[], None]:
        def answer() -> None:
            server.busy -= 1
            server.worked_s += lasted_s
            then()
            self._serve(server)

        return answer

    # Time

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _until(self, end: float) -> None:
        while self._events and self._events[0][0] <= end:
            self._now, _, what = heapq.heappop(self._events)
            what()
        self._now = end


def _p99(values: Sequence[float], none: float) -> float:
    """`none` where nothing was answered at all."""
    return round(sorted(values)[int(0.99 * len(values))], 4) if values else none


def simulate(house: House, sizes: Sequence[int], *, least_s: float = 5.0, seed: int = 1) -> list[Outcome]:
    """Each size of the fleet, for the time of some packs and `least_s` seconds at least, after as long a start.

    Whole packs: the places of a GPU end together in the beginning, and a part of one would count too many or few.
    """
    pack_s = house.pack / house.jobs_per_s
    lasts_s = max(2, math.ceil(least_s / pack_s)) * pack_s
    return [Simulation(house, size, random.Random(seed)).run(lasts_s, lasts_s) for size in sizes]


def limits(house: House) -> dict[str, int]:
    """The workers at which each part ends, by its prices alone; the least of them breaks first."""
    prices = house.prices
    clock_ms, job_ms = prices.clock_ms, prices.job_ms
    bound = {
        # Three are kept for whoever repairs it.
        "PostgreSQL's connections": (house.max_connections - 3) / prices.connections,
        "PostgreSQL's cores": 1e3 * house.database_cores / (clock_ms + house.jobs_per_s * job_ms),
        "Redis' clients": house.max_clients / prices.broker_clients,
        "Redis' core": 1e3 / (prices.redis_clock_ms + house.jobs_per_s * prices.redis_ms),
        "heartbeats alone, of PostgreSQL's cores": house.database_cores * 1e3 / prices.asked_ms("heartbeat"),
        "sweeper and ringer alone, of PostgreSQL's cores": house.database_cores * 1e3 / prices.asked_ms("sweep", "due"),
        "looks for urgent jobs alone, of PostgreSQL's cores": house.database_cores * 1e3 / prices.asked_ms("lookout"),
    }
    return {name: int(size) for name, size in bound.items()}
