"""The lookout takes in jobs that somebody waits for, while others fill every slot."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from uuid import UUID

import pytest

from jobs import JobSpec, Settings, schema
from jobs.store import Store
from tests.worker.helpers import PATIENCE_S, Clock, wait
from worker.lookout import BELL_AGE_S, Lookout
from worker.slots import Slots
from worker.sweeper import WITH_BROKER

SLOTS, MOST = 2, 2
LISTEN_S, LOOKOUT_S = 1.0, 60.0
PACE = replace(WITH_BROKER, listen_s=LISTEN_S, lookout_s=LOOKOUT_S)


class World:
    """A worker with so many slots taken; stories begin and end when told. Its lookout looks when a test calls it,
    or starts it: never both, for it is made for one thread."""

    def __init__(self, store: Store, taken: int) -> None:
        self.store, self.slots, self.told = store, Slots(SLOTS, forget_s=60, clock=Clock()), list[str]()
        self.began, self.may_end = threading.Semaphore(0), threading.Event()
        self._taken: list[ExitStack] = []
        for number in range(taken):
            self.take(f"bulk {number}")
        self.clock, self.bells = Clock(), 0
        self.lookout = Lookout(
            store,
            self.slots,
            ["nightshift-mini"],
            self._story,
            PACE,
            most=MOST,
            bells=self._waiting,
            clock=self.clock,
        )

    def take(self, job: str) -> None:
        self._taken.append(ExitStack())
        self._taken[-1].enter_context(self.slots.take(job))

    def let_one_go(self) -> None:
        self._taken.pop().close()

    def _waiting(self) -> int:
        if self.bells < 0:
            raise OSError("the broker is away")
        return self.bells

    def _story(self, job_id: str) -> None:
        self.told.append(job_id)
        self.began.release()
        wait(self.may_end)

    def submit(self, *priorities: int) -> list[str]:
        """By one statement: the lookout sees all of them or none."""
        return [str(view.id) for view in self.store.submit([JobSpec(prompt="x", priority=p) for p in priorities])]

    def close(self) -> None:
        self.may_end.set()
        if self.lookout.is_alive():
            self.lookout.finish()
        while self._taken:
            self.let_one_go()


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    yield store
    store.close()


@pytest.fixture
def full(store: Store) -> Iterator[World]:
    world = World(store, SLOTS)
    yield world
    world.close()


def began(world: World) -> None:
    assert world.began.acquire(timeout=PATIENCE_S), "no story began"


def test_a_full_worker_takes_in_the_job_that_somebody_waits_for(full: World) -> None:
    *_, wanted = full.submit(0, 0, 0, 7)
    full.lookout.start()
    began(full)
    assert full.told == [wanted]


def test_bulk_jobs_wait_for_the_slots(full: World) -> None:
    full.submit(6, 0, 5)
    assert full.lookout.tick() == LISTEN_S
    assert full.lookout._inside == []


def test_a_worker_with_a_free_slot_leaves_them_to_the_bell(store: Store) -> None:
    world = World(store, SLOTS - 1)
    world.submit(9)
    world.lookout.tick()
    assert world.lookout._inside == []
    world.close()


def test_a_worker_that_leaves_takes_in_nothing(full: World) -> None:
    full.slots.close()
    full.submit(9)
    full.lookout.tick()
    assert full.lookout._inside == []


def test_no_more_than_so_many_at_once_and_the_most_urgent_first(full: World) -> None:
    _, *first, _ = full.submit(7, 9, 9, 8)
    full.lookout.tick()
    for _ in range(MOST):
        began(full)
    full.clock.now += LOOKOUT_S
    full.lookout.tick()
    assert sorted(full.told) == sorted(first)


def test_who_found_one_looks_again_as_soon_as_there_is_room(full: World) -> None:
    for _ in range(2):
        full.submit(9, 9)
    full.lookout.tick()
    for _ in range(MOST):
        began(full)
    for job_id in full.told:
        assert full.store.claim(UUID(job_id), "worker:1:1", lease_s=60.0)
    full.clock.now += LISTEN_S
    full.lookout.tick()
    full.may_end.set()
    for thread in full.lookout._inside:
        thread.join(PATIENCE_S)
    full.clock.now += LISTEN_S
    full.lookout.tick()
    for _ in range(MOST):
        began(full)
    assert len(set(full.told)) == 2 * MOST


def looked(world: World) -> World:
    """A world whose lookout has looked and found nothing; a bell that nobody answered waits."""
    world.bells = 1
    world.lookout.tick()
    world.clock.now += BELL_AGE_S
    world.lookout.tick()
    assert world.lookout._inside == []
    return world


def test_one_bell_more_calls_for_a_look_when_free_workers_had_time_to_answer(full: World) -> None:
    looked(full).submit(9)
    full.bells += 1
    assert full.lookout.tick() == pytest.approx(BELL_AGE_S)
    assert full.lookout._inside == []
    full.clock.now += BELL_AGE_S
    full.lookout.tick()
    began(full)


def test_a_bell_that_was_too_young_for_a_look_that_was_due_has_another(full: World) -> None:
    full.bells = 1
    assert full.lookout.tick() == pytest.approx(BELL_AGE_S)
    full.submit(9)
    full.clock.now += BELL_AGE_S
    full.lookout.tick()
    began(full)


def test_a_bell_that_waits_on_calls_for_no_further_look(full: World) -> None:
    looked(full).submit(9)
    full.clock.now += LOOKOUT_S / 2
    full.lookout.tick()
    assert full.lookout._inside == []


@pytest.mark.parametrize("bells", [0, -1], ids=["the bell was lost", "the broker is away"])
def test_the_database_is_asked_now_and_then_whatever_the_broker_says(full: World, bells: int) -> None:
    looked(full).submit(9)
    full.bells = bells
    full.clock.now += LOOKOUT_S / 2
    full.lookout.tick()
    assert full.lookout._inside == []
    full.clock.now += LOOKOUT_S / 2
    full.lookout.tick()
    began(full)


def test_who_had_a_free_slot_takes_every_bell_that_waits_for_a_new_one(full: World) -> None:
    """The slot answered the bell that was counted, and was taken again before the next tick."""
    looked(full).submit(9)
    full.let_one_go()
    full.take("another")
    full.lookout.tick()
    full.clock.now += BELL_AGE_S
    full.lookout.tick()
    began(full)


def test_it_returns_when_what_it_took_in_has_ended(store: Store) -> None:
    world = World(store, SLOTS)
    world.submit(9)
    world.lookout.start()
    began(world)
    leaving = threading.Thread(target=world.close)
    finishing = threading.Thread(target=world.lookout.finish)
    finishing.start()
    finishing.join(0.1)
    assert finishing.is_alive()
    leaving.start()
    leaving.join(PATIENCE_S)
    finishing.join(PATIENCE_S)
    assert not finishing.is_alive()
