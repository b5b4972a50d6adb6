"""The ringer rings for waiting rows within the free slots, the sweeper brings expired leases back."""

from collections.abc import Callable, Iterator

import pytest

from jobs import JobSpec, Settings, State, schema
from jobs.store import Store
from jobs.views import Due
from tests.worker.helpers import Clock
from worker.slots import Slots
from worker.sweeper import EMBEDDED, WITH_BROKER, Ringer, Sweeper, pace_for


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    yield store
    store.close()


def ringer(store: Store, slots: Slots, rung: list[Due], waiting: Callable[[], int] | None = None) -> Ringer:
    return Ringer(store, rung.append, slots, ["nightshift-mini"], EMBEDDED, waiting=waiting)


def submit(store: Store, count: int, **fields: object) -> None:
    store.submit([JobSpec.model_validate({"prompt": f"star {number}"} | fields) for number in range(count)])


def test_it_rings_for_no_more_than_the_free_slots_and_once_only(store: Store) -> None:
    submit(store, 5)
    rung: list[Due] = []
    ring = ringer(store, Slots(3, forget_s=60, clock=Clock()), rung)
    ring.tick()
    ring.tick()
    assert len(rung) == 3


def test_the_most_urgent_go_first(store: Store) -> None:
    for priority in (0, 9, 4):
        submit(store, 1, priority=priority)
    rung: list[Due] = []
    ringer(store, Slots(3, forget_s=60, clock=Clock()), rung).tick()
    assert [due.priority for due in rung] == [9, 4, 0]


def test_models_of_other_workers_are_left_alone(store: Store) -> None:
    submit(store, 2, model="another")
    rung: list[Due] = []
    ringer(store, Slots(3, forget_s=60, clock=Clock()), rung).tick()
    assert rung == []


def test_a_worker_that_leaves_rings_for_nothing(store: Store) -> None:
    submit(store, 2)
    slots, rung = Slots(3, forget_s=60, clock=Clock()), list[Due]()
    slots.close()
    ringer(store, slots, rung).tick()
    assert rung == []


def test_a_job_whose_worker_died_is_rung_again(store: Store) -> None:
    submit(store, 1)
    rung: list[Due] = []
    ring = ringer(store, Slots(3, forget_s=60, clock=Clock()), rung)
    ring.tick()
    store.claim(rung[0].id, "host:2:dead", lease_s=0.0)
    Sweeper(store, 5.0).tick()
    ringer(store, Slots(3, forget_s=60, clock=Clock()), rung).tick()
    assert [due.id for due in rung] == [rung[0].id] * 2
    assert store.get(rung[0].id).state is State.queued


def test_the_pace_follows_the_broker_and_short_leases() -> None:
    assert pace_for("memory://", 30) == EMBEDDED
    assert pace_for("redis://host/0", 30) == WITH_BROKER
    assert pace_for("redis://host/0", 2).sweep_s == 0.5


def test_bells_that_wait_in_the_broker_are_not_rung_again(store: Store) -> None:
    submit(store, 9)
    rung: list[Due] = []
    ringer(store, Slots(5, forget_s=60, clock=Clock()), rung, waiting=lambda: 3).tick()
    assert len(rung) == 2
    ringer(store, Slots(5, forget_s=60, clock=Clock()), rung, waiting=lambda: 5).tick()
    assert len(rung) == 2


def test_a_broker_that_is_away_makes_no_bell_look_fresh(store: Store) -> None:
    submit(store, 2)
    rung: list[Due] = []
    away = ringer(store, Slots(5, forget_s=60, clock=Clock()), rung, waiting=answers_nothing)
    with pytest.raises(ConnectionError):
        away.tick()
    ringer(store, Slots(5, forget_s=60, clock=Clock()), rung, waiting=lambda: 0).tick()
    assert len(rung) == 2


def answers_nothing() -> int:
    raise ConnectionError("away")
