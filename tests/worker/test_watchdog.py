"""A step that hangs ends the process; what it held goes back, and only what was in the engine is suspected."""

import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest

from jobs import JobSpec, Settings, State, schema
from jobs.store import Store
from sd_engine import Request
from tests.fakes import fake_workshop
from tests.worker.helpers import PATIENCE_S, Clock, Gate, wait
from worker.engine_thread import EngineThread
from worker.exit_codes import HUNG
from worker.heartbeat import Heartbeat
from worker.leases import Leases
from worker.watchdog import STEP_LIMIT_CPU_S, STEP_LIMIT_S, Watchdog, give_back, step_limit_for

WORKER = "host:1:test"


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    yield store
    store.close()


class Stuck:
    """An engine whose step waits at a gate, under a clock that moves when told."""

    def __init__(self) -> None:
        self.clock, self.gate = Clock(), Gate()
        self.engine = EngineThread(lambda: fake_workshop(before_step=self.gate), clock=self.clock)
        self.engine.start()
        self.codes: list[int] = []

    def begin(self) -> None:
        self.future = self.engine.render(uuid4(), [Request("a star", model="nightshift-mini", seed=1, steps=1)])
        wait(self.gate.reached)

    def watchdog(self, given_back: threading.Event | None = None) -> Watchdog:
        return Watchdog(self.engine, 300.0, (given_back or threading.Event()).set, exit=self.codes.append)


@pytest.fixture
def stuck() -> Iterator[Stuck]:
    stuck = Stuck()
    yield stuck
    stuck.gate.opened.set()
    stuck.engine.close()
    stuck.engine.join(PATIENCE_S)


def test_a_step_that_hangs_ends_the_process_and_says_where(stuck: Stuck, caplog: pytest.LogCaptureFixture) -> None:
    given_back = threading.Event()
    watchdog = stuck.watchdog(given_back)
    stuck.begin()
    stuck.clock.now += 301
    watchdog.tick()
    assert (stuck.codes, given_back.is_set()) == ([HUNG], True)
    assert "in step" in caplog.text and "tests/worker/helpers.py" in caplog.text


def test_a_step_within_its_limit_and_an_idle_engine_are_left_alone(stuck: Stuck) -> None:
    watchdog = stuck.watchdog()
    stuck.clock.now += 1000
    watchdog.tick()
    stuck.begin()
    stuck.clock.now += 300
    watchdog.tick()
    assert (stuck.codes, watchdog.step_moves()) == ([], True)


def test_slow_steps_are_told_once_before_they_count_as_hung(stuck: Stuck, caplog: pytest.LogCaptureFixture) -> None:
    watchdog = stuck.watchdog()
    stuck.begin()
    stuck.clock.now += 200
    watchdog.tick()
    watchdog.tick()
    assert caplog.text.count("--step-limit-seconds") == 1


def test_a_database_that_hangs_does_not_hold_the_process(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.watchdog.PATIENCE_S", 0.1)
    never = threading.Event()
    watchdog = Watchdog(stuck.engine, 300.0, lambda: wait(never), exit=stuck.codes.append)
    stuck.begin()
    stuck.clock.now += 301
    watchdog.tick()
    never.set()
    assert stuck.codes == [HUNG]


def test_only_jobs_in_the_engine_are_suspected(store: Store) -> None:
    leases = Leases(lambda token, reason: None)
    ids = [job.id for job in store.submit([JobSpec(prompt="drawn"), JobSpec(prompt="in the engine")])]
    for id in ids:
        claim = store.claim(id, WORKER)
        assert claim is not None
        leases.take(claim, 0.0).drawn = id == ids[0]
    give_back(store, leases)
    assert [(store.get(id).state, store.get(id).suspect, store.get(id).attempts) for id in ids] == [
        (State.queued, False, 0),
        (State.queued, True, 0),
    ]


def test_a_suspect_that_hung_alone_is_not_handed_back_for_its_lease_is_to_tell_on_it(store: Store) -> None:
    leases = Leases(lambda token, reason: None)
    (job,) = store.submit([JobSpec(prompt="hangs")])
    first = store.claim(job.id, WORKER)
    assert first is not None
    store.release(first, suspect=True)
    alone = store.claim(job.id, WORKER, alone=True)
    assert alone is not None
    leases.take(alone, 0.0)
    give_back(store, leases)
    assert (store.get(job.id).state, store.get(job.id).solo_crashes) == (State.running, 1)


def test_leases_of_a_step_that_hangs_are_not_extended_but_those_of_drawn_pictures_are(store: Store) -> None:
    clock, leases = Clock(), Leases(lambda token, reason: None)
    heartbeat = Heartbeat(store, leases, WORKER, lease_s=30, beat_s=10, poll_s=1, step_moves=lambda: False, clock=clock)
    held = []
    for job in store.submit([JobSpec(prompt="drawn"), JobSpec(prompt="in the engine")]):
        claim = store.claim(job.id, WORKER)
        assert claim is not None
        held.append(leases.take(claim, clock.now))
    held[0].drawn = True
    clock.now += 10
    heartbeat.beat()
    assert [lease.trusted_since for lease in held] == [clock.now, clock.now - 10]
    assert [lease.reason for lease in held] == [None, None]


def test_a_cpu_is_given_more_time() -> None:
    assert (step_limit_for("cpu"), step_limit_for("cuda:0")) == (STEP_LIMIT_CPU_S, STEP_LIMIT_S)
