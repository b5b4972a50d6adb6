"""A process that hears no bells although they lie there leaves; one that merely has nothing to do, or whose broker is
away, stays."""

from collections.abc import Iterator

import pytest

from jobs import JobSpec, Settings, schema
from jobs.store import Store
from tests.worker.helpers import Clock
from worker.exit_codes import NOT_CONSUMING
from worker.liveness import Liveness, patience_for
from worker.slots import Slots


class World:
    def __init__(self, store: Store) -> None:
        self.store, self.clock, self.codes, self.bells, self.held = store, Clock(), list[int](), 1, 0
        self.slots = Slots(2, forget_s=60, clock=self.clock)
        self.liveness = Liveness(
            store,
            self.slots,
            self.waiting,
            ("nightshift-mini",),
            patience_s=60,
            held=lambda: self.held,
            clock=self.clock,
            exit=self.codes.append,
        )

    def waiting(self) -> int:
        if self.bells < 0:
            raise ConnectionError("away")
        return self.bells

    def pass_(self, seconds: float) -> None:
        """Time in which the thread looks as often as it wants to."""
        until = self.clock.now + seconds
        while self.clock.now < until and not self.codes:
            try:
                wait_s = self.liveness.tick()
            except ConnectionError:
                wait_s = 6.0
            self.clock.now += wait_s


@pytest.fixture
def world(settings: Settings) -> Iterator[World]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    store.submit([JobSpec(prompt="a star")])
    yield World(store)
    store.close()


def test_a_deaf_worker_leaves(world: World) -> None:
    world.pass_(59)
    assert world.codes == []
    world.pass_(20)
    assert world.codes == [NOT_CONSUMING]


def test_a_worker_that_hears_bells_stays_whatever_lies_in_the_broker(world: World) -> None:
    for _ in range(20):
        world.pass_(30)
        with world.slots.take("a bell, also one of a job that somebody else has"):
            pass
    assert world.codes == []


def test_a_busy_worker_stays(world: World) -> None:
    with world.slots.take("a long job"):
        world.pass_(600)
    assert world.codes == []


def test_a_deaf_worker_stays_until_its_pictures_are_stored(world: World) -> None:
    world.held = 3
    world.pass_(600)
    assert world.codes == []
    world.held = 0
    world.pass_(70)
    assert world.codes == [NOT_CONSUMING]


def test_a_broker_that_is_away_is_no_reason_to_leave(world: World) -> None:
    world.bells = -1
    world.pass_(600)
    world.bells = 1
    world.pass_(59)  # the time in which it was away does not count
    assert world.codes == []


def test_a_worker_without_bells_or_without_rows_stays(world: World) -> None:
    world.bells = 0
    world.pass_(600)
    assert world.codes == []
    world.bells = 5
    claim = next(iter(world.store.due(1)))
    world.store.claim(claim.id, "host:2:another")
    world.pass_(600)
    assert world.codes == []


def test_a_worker_that_leaves_anyway_is_not_hurried(world: World) -> None:
    world.slots.close()
    world.pass_(600)
    assert world.codes == []


def test_patience_follows_the_lease_but_outlasts_a_reconnect() -> None:
    assert (patience_for(30), patience_for(2)) == (60, 20)
