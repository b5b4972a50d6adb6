"""The sweeper: rings for waiting rows within the free slots, and brings expired leases back."""

from collections.abc import Iterator

import pytest

from jobs import JobSpec, Settings, State, schema
from jobs.store import Store
from jobs.views import Due
from tests.worker.helpers import Clock
from worker.slots import Slots
from worker.sweeper import EMBEDDED, WITH_BROKER, Sweeper, pace_for


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    yield store
    store.close()


def sweeper(store: Store, slots: Slots, rung: list[Due]) -> Sweeper:
    return Sweeper(store, rung.append, slots, ["nightshift-mini"], EMBEDDED, clock=Clock())


def submit(store: Store, count: int, **fields: object) -> None:
    store.submit([JobSpec.model_validate({"prompt": f"star {number}"} | fields) for number in range(count)])


def test_it_rings_for_no_more_than_the_free_slots_and_once_only(store: Store) -> None:
    submit(store, 5)
    rung: list[Due] = []
    sweep = sweeper(store, Slots(3, forget_s=60, clock=Clock()), rung)
    sweep.tick()
    sweep.tick()
    assert len(rung) == 3


def test_the_most_urgent_go_first(store: Store) -> None:
    for priority in (0, 9, 4):
        submit(store, 1, priority=priority)
    rung: list[Due] = []
    sweeper(store, Slots(3, forget_s=60, clock=Clock()), rung).tick()
    assert [due.priority for due in rung] == [9, 4, 0]


def test_models_of_other_workers_are_left_alone(store: Store) -> None:
    submit(store, 2, model="another")
    rung: list[Due] = []
    sweeper(store, Slots(3, forget_s=60, clock=Clock()), rung).tick()
    assert rung == []


def test_a_worker_that_leaves_rings_for_nothing(store: Store) -> None:
    submit(store, 2)
    slots, rung = Slots(3, forget_s=60, clock=Clock()), list[Due]()
    slots.close()
    sweeper(store, slots, rung).tick()
    assert rung == []


def test_a_job_whose_worker_died_is_rung_again(store: Store) -> None:
    submit(store, 1)
    rung: list[Due] = []
    sweep = sweeper(store, Slots(3, forget_s=60, clock=Clock()), rung)
    sweep.tick()
    store.claim(rung[0].id, "host:2:dead", lease_s=0.0)
    sweeper(store, Slots(3, forget_s=60, clock=Clock()), rung).tick()
    assert [due.id for due in rung] == [rung[0].id] * 2
    assert store.get(rung[0].id).state is State.queued


def test_the_pace_follows_the_broker_and_short_leases() -> None:
    assert pace_for("memory://", 30) == EMBEDDED
    assert pace_for("redis://host/0", 30) == WITH_BROKER
    assert pace_for("redis://host/0", 2).sweep_s == 0.5
