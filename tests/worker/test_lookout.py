"""The lookout takes in jobs that somebody waits for, while others fill every slot."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from jobs import JobSpec, Settings, schema
from jobs.store import Store
from tests.worker.helpers import PATIENCE_S, Clock, wait
from worker.lookout import Lookout
from worker.slots import Slots

SLOTS, MOST = 2, 2


class World:
    """A worker with so many slots taken; stories begin and end when told. Its lookout looks when a test calls it,
    or starts it: never both, for it is made for one thread."""

    def __init__(self, store: Store, taken: int) -> None:
        self.store, self.slots, self.told = store, Slots(SLOTS, forget_s=60, clock=Clock()), list[str]()
        self.began, self.may_end = threading.Semaphore(0), threading.Event()
        self._taken = ExitStack()
        for number in range(taken):
            self._taken.enter_context(self.slots.take(f"bulk {number}"))
        self.lookout = Lookout(store, self.slots, ["nightshift-mini"], self._story, most=MOST, look_s=60.0)

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
        self._taken.close()


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
    full.lookout.start()
    *_, wanted = full.submit(0, 0, 0, 7)
    full.lookout.wake()
    began(full)
    assert full.told == [wanted]


def test_bulk_jobs_wait_for_the_slots(full: World) -> None:
    full.submit(6, 0, 5)
    assert full.lookout.tick() == 60.0
    assert full.told == []


def test_a_worker_with_a_free_slot_leaves_them_to_the_bell(store: Store) -> None:
    world = World(store, SLOTS - 1)
    world.submit(9)
    world.lookout.tick()
    assert world.told == []
    world.close()


def test_a_worker_that_leaves_takes_in_nothing(full: World) -> None:
    full.slots.close()
    full.submit(9)
    full.lookout.tick()
    assert full.told == []


def test_no_more_than_so_many_at_once_and_the_most_urgent_first(full: World) -> None:
    _, *first, _ = full.submit(7, 9, 9, 8)
    full.lookout.tick()
    for _ in range(MOST):
        began(full)
    full.lookout.tick()
    assert sorted(full.told) == sorted(first)


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
