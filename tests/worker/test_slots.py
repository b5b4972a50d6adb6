"""Slots: what a worker may still ring for."""

from tests.worker.helpers import Clock
from worker.slots import Slots


def test_running_and_rung_jobs_take_slots_and_a_rung_job_that_starts_counts_once() -> None:
    slots = Slots(3, forget_s=5, clock=Clock())
    slots.ring("a")
    slots.ring("b")
    assert slots.free() == 1
    with slots.take("a"):
        assert slots.free() == 1
        assert slots.busy() == 1
    assert slots.free() == 2


def test_a_bell_that_nobody_answered_is_forgotten() -> None:
    clock = Clock()
    slots = Slots(1, forget_s=5, clock=clock)
    slots.ring("taken by another worker")
    assert slots.free() == 0
    clock.now += 5
    assert slots.free() == 1


def test_there_is_never_less_than_no_room() -> None:
    slots = Slots(1, forget_s=5, clock=Clock())
    with slots.take("a"), slots.take("b"):
        assert slots.free() == 0


def test_a_process_that_leaves_has_no_room() -> None:
    slots = Slots(4, forget_s=5, clock=Clock())
    slots.close()
    assert slots.free() == 0
