"""Every order in which two connections can handle one job: the end is always that of one after the other.

On PostgreSQL two real transactions run against each other, statement by statement and commit by commit, and wait for
each other's locks; on SQLite `BEGIN IMMEDIATE` lets one in at a time, so that the orders of whole transactions are all
that there is.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from jobs import schema
from jobs.db import db_now
from jobs.errors import JobConflict
from jobs.models import MAX_ATTEMPTS, MAX_SOLO_CRASHES, image, job
from jobs.spec import JobSpec
from jobs.states import TERMINAL, State
from jobs.store import Store
from jobs.views import Claim, Output
from tests.faults.mutating import VARIABLE
from tests.jobs.test_store_machine import run_machine

WORKER, OTHER = "worker-1", "worker-2"
#: How long an actor may take for a statement before we take it to wait for the other's lock.
BLOCKED_S = 0.02
PATIENCE_S = 30.0

Act = Callable[[Store, Claim], object]


def cancel(store: Store, claim: Claim) -> object:
    try:
        return store.cancel(claim.job_id)
    except JobConflict:
        return "conflict"


def beat(store: Store, claim: Claim) -> object:
    seen = store.heartbeat(WORKER, [claim.token])
    return len(seen.held), len(seen.cancelled)


#: The four that no night goes without; `make test` looks at these alone, `make faults` at all.
FEW = ("claim", "sweep", "finish", "cancel")
#: What can happen to a job. What a sweep counts is left out: it may leave a row that somebody holds to the next one.
ACTS: Mapping[str, Act] = MappingProxyType(
    {
        "claim": lambda store, claim: store.claim(claim.job_id, OTHER, alone=True) is not None,
        "sweep": lambda store, _: store.sweep() and None,
        "finish": lambda store, claim: store.finish(claim, [Output(0, f"images/{uuid4()}", 1, 8, 8, "s", 1)]),
        "fail": lambda store, claim: store.fail(claim, "boom", retry=True),
        "release": lambda store, claim: store.release(claim, saved_key="saved/new"),
        "vouch": lambda store, claim: store.vouch(claim),
        "cancel": cancel,
        "confirm": lambda store, claim: store.confirm_cancelled(claim),
        "beat": beat,
    }
)
#: Where the job is when they begin; its worker holds the claim that all acts are about, or did.
STARTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "held": {"state": State.running, "attempts": 1, "lease_expires_at": db_now(3600)},
        "expired": {"state": State.running, "attempts": 1, "lease_expires_at": db_now(-60)},
        "wanted": {
            "state": State.running,
            "attempts": 1,
            "lease_expires_at": db_now(-60),
            "cancel_requested_at": db_now(),
        },
        "last crash": {
            "state": State.running,
            "attempts": 1,
            "lease_expires_at": db_now(-60),
            "suspect": True,
            "solo_crashes": MAX_SOLO_CRASHES,
        },
        "swept": {"state": State.queued, "suspect": True},
    }
)
BLANK: Mapping[str, object] = MappingProxyType(
    {
        "attempts": 0,
        "suspect": False,
        "solo_crashes": 0,
        "saved_key": "saved/old",
        "error": None,
        "lease_expires_at": None,
        "cancel_requested_at": None,
        "finished_at": None,
        "worker_id": WORKER,
        "rung_at": None,
    }
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the acts returned, and how the job stands after one more sweep."""

    answers: tuple[object, ...]
    state: str
    attempts: int
    solo_crashes: int
    suspect: bool
    saved_key: str | None
    wanted: bool
    available: bool
    owner: str | None
    images: int


class Table:
    """One job in a database, put where a run begins, time after time."""

    def __init__(self, url: str) -> None:
        self.store = Store.open(url)
        schema.upgrade(self.store.engines)
        self.id: UUID = self.store.submit([JobSpec(prompt="x")])[0].id

    def place(self, start: str) -> Claim:
        """The claim that the job is, or was, held under."""
        token, values = uuid4(), {**BLANK, **STARTS[start]}
        with self.store.engines.writer.begin() as connection:
            connection.execute(sa.delete(image))
            connection.execute(sa.update(job).values(lease_token=token, available_at=db_now(-60), **values))
        alone = bool(values["suspect"]) and start != "swept"
        return Claim(self.id, token, 1, JobSpec(prompt="x"), WORKER, alone, "saved/old")

    def outcome(self, *answers: object) -> Outcome:
        self.store.sweep()
        with self.store.engines.reader.connect() as connection:
            available = (job.c.available_at <= db_now()).label("available")
            row = connection.execute(sa.select(job, available).where(job.c.id == self.id)).one()
            images = len(connection.scalars(sa.select(image.c.key)).all())
        running = row.state == State.running
        return Outcome(
            answers,
            row.state,
            row.attempts,
            row.solo_crashes,
            row.suspect,
            row.saved_key,
            row.cancel_requested_at is not None,
            bool(row.available),
            row.worker_id if running else None,
            images,
        )


def check_legal(outcome: Outcome) -> None:
    """What holds in every state that a job can rest in."""
    assert 0 <= outcome.attempts <= MAX_ATTEMPTS, outcome
    assert 0 <= outcome.solo_crashes <= (MAX_SOLO_CRASHES if outcome.suspect else 0), outcome
    assert outcome.images == (outcome.state == State.succeeded), outcome
    assert not (outcome.wanted and outcome.state == State.queued), outcome
    assert outcome.saved_key is None or outcome.state not in TERMINAL, outcome


def check_fenced(start: str, names: Sequence[str], outcome: Outcome) -> None:
    """Who lost the lease before it began has changed nothing, whoever holds the job by now."""
    answers = dict(zip(names, outcome.answers, strict=True)) if start == "swept" else {}
    assert not any(answers.get(name) for name in ("finish", "fail", "release", "confirm")), f"{start}: {outcome}"


class Actor:
    """Does acts with connections of its own, and stops before each statement and each commit until it may go on."""

    def __init__(self, url: str) -> None:
        self._store = Store.open(url)
        with self._store.engines.writer.connect():  # what a first connection asks is no part of an act
            pass
        self._pool = ThreadPoolExecutor(1)
        self._waits, self._may_go = threading.Event(), threading.Semaphore(0)
        self._free = True
        sa.event.listen(self._store.engines.writer, "before_cursor_execute", lambda *_: self._stop())
        sa.event.listen(self._store.engines.writer, "commit", lambda _: self._stop())

    def begin(self, act: Act, claim: Claim) -> None:
        """Go to the first stop."""
        self._free = False
        self._waits.clear()
        self._result: Future[object] = self._pool.submit(act, self._store, claim)
        self._result.add_done_callback(lambda _: self._waits.set())
        self._waits.wait(PATIENCE_S)

    def go_on(self) -> None:
        """To the next stop, to the end, or into the other's lock."""
        if not self._waits.is_set() or self._result.done():
            return  # it waits for the other already, or has nothing left to do
        self._waits.clear()
        self._may_go.release()
        self._waits.wait(BLOCKED_S)

    def let_go(self) -> None:
        """No more stops."""
        self._free = True
        self._may_go.release()

    def answer(self) -> object:
        answer = self._result.result(PATIENCE_S)
        self._may_go = threading.Semaphore(0)
        return answer

    def close(self) -> None:
        self._pool.shutdown()
        self._store.close()

    def _stop(self) -> None:
        if not self._free:
            self._waits.set()
            self._may_go.acquire(timeout=PATIENCE_S)


@pytest.fixture
def thorough(pytestconfig: pytest.Config) -> bool:
    """Whether there is time for all of them."""
    return VARIABLE not in os.environ and bool(
        pytestconfig.getoption("--seeds") or pytestconfig.getoption("--seed") is not None
    )


@pytest.fixture
def actors(migrated_postgres: str) -> Iterator[tuple[Actor, Actor]]:
    first, second = Actor(migrated_postgres), Actor(migrated_postgres)
    yield first, second
    first.close()
    second.close()


@pytest.fixture
def migrated_postgres(postgres_url: str) -> str:
    store = Store.open(postgres_url)
    schema.upgrade(store.engines)
    store.close()
    return postgres_url


@pytest.fixture
def table(migrated_postgres: str) -> Iterator[Table]:
    table = Table(migrated_postgres)
    yield table
    table.store.close()


#: Who moves, stop by stop; then both run free. With its last letter each has committed, or waits for the other.
ORDERS = sorted(set(itertools.permutations((0, 0, 1, 1))))


@pytest.mark.parametrize("start", STARTS)
def test_every_interleaving_of_two_transactions_ends_as_one_after_the_other(
    table: Table, actors: tuple[Actor, Actor], start: str, thorough: bool
) -> None:
    for names in itertools.combinations_with_replacement(ACTS if thorough else FEW, 2):
        acts = [ACTS[name] for name in names]
        serial = {in_turn(table, start, acts, order) for order in ((0, 1), (1, 0))}
        for outcome in serial:
            check_legal(outcome)
            check_fenced(start, names, outcome)
        for order in ORDERS:
            outcome = together(table, actors, start, acts, order)
            check_legal(outcome)
            assert outcome in serial, f"{start}: {names} in the order {order}: {outcome}, not one of {serial}"


def in_turn(table: Table, start: str, acts: list[Act], order: tuple[int, ...]) -> Outcome:
    """One act after the other."""
    claim = table.place(start)
    answers = {i: acts[i](table.store, claim) for i in order}
    return table.outcome(*(answers[i] for i in range(len(acts))))


def together(table: Table, actors: tuple[Actor, Actor], start: str, acts: list[Act], order: tuple[int, ...]) -> Outcome:
    """Two acts at once, each stop by stop as the order says."""
    claim = table.place(start)
    for actor, act in zip(actors, acts, strict=True):
        actor.begin(act, claim)
    for i in order:
        actors[i].go_on()
    for actor in actors:
        actor.let_go()
    return table.outcome(*(actor.answer() for actor in actors))


def test_every_order_of_whole_transactions_ends_legally_and_alike_on_both_databases(
    table: Table, tmp_path: Path, thorough: bool
) -> None:
    file = Table(f"sqlite:///{tmp_path / 'jobs.db'}")
    for start in STARTS if thorough else ("expired",):
        for names in itertools.permutations([*FEW, "vouch"] if thorough else FEW):
            acts, order = [ACTS[name] for name in names], tuple(range(len(names)))
            outcome = in_turn(file, start, acts, order)
            check_legal(outcome)
            check_fenced(start, names, outcome)
            assert outcome == in_turn(table, start, acts, order), f"{start}: {names}"
    file.store.close()


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_more_random_games_with_the_store(
    database: str, tmp_path: Path, request: pytest.FixtureRequest, thorough: bool
) -> None:
    """What `tests/jobs` plays a little, at length."""
    if not thorough:
        pytest.skip("played with --seeds or --seed")
    if database == "sqlite":
        run_machine(f"sqlite:///{tmp_path / 'games.db'}", examples=300, steps=60)
    else:
        run_machine(request.getfixturevalue("postgres_url"), examples=100, steps=60)
