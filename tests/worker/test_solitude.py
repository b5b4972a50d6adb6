"""The gate before the claim: together, or one alone."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from tests.worker.helpers import PATIENCE_S, wait
from worker.solitude import Solitude


class Visitor(threading.Thread):
    """Goes in by one of the two doors, stays until told, and says whether it was let in."""

    def __init__(self, door: Callable[[], AbstractContextManager[bool]]) -> None:
        super().__init__(daemon=True)
        self._door = door
        self.inside, self.may_leave = threading.Event(), threading.Event()
        self.entered: bool | None = None
        self.start()

    def run(self) -> None:
        with self._door() as self.entered:
            self.inside.set()
            wait(self.may_leave)

    def leave(self) -> None:
        self.may_leave.set()
        self.join(PATIENCE_S)
        assert not self.is_alive()


@pytest.fixture
def gate() -> Solitude:
    return Solitude()


@pytest.fixture
def visit(gate: Solitude) -> Iterator[Callable[..., Visitor]]:
    visitors: list[Visitor] = []

    def come(*, alone: bool) -> Visitor:
        visitors.append(Visitor(gate.alone if alone else gate.company))
        return visitors[-1]

    yield come
    gate.close()
    for visitor in visitors:
        visitor.leave()


def waits(visitor: Visitor) -> bool:
    """Nothing tells that a thread will not come in; a moment in which it could is all the evidence there is."""
    return not visitor.inside.wait(0.05)


def test_many_are_inside_together(visit: Callable[..., Visitor]) -> None:
    for visitor in [visit(alone=False) for _ in range(3)]:
        wait(visitor.inside)


def test_who_is_alone_waits_for_the_others_and_goes_before_newcomers(visit: Callable[..., Visitor]) -> None:
    first = visit(alone=False)
    wait(first.inside)
    suspect = visit(alone=True)
    assert waits(suspect)
    newcomer = visit(alone=False)
    assert waits(newcomer)
    first.leave()
    wait(suspect.inside)
    assert waits(newcomer)
    suspect.leave()
    wait(newcomer.inside)


def test_two_suspects_are_alone_one_after_the_other(visit: Callable[..., Visitor]) -> None:
    first = visit(alone=True)
    wait(first.inside)
    second = visit(alone=True)
    assert waits(second)
    first.leave()
    wait(second.inside)


def test_a_closed_gate_lets_nobody_in_and_wakes_those_who_wait(gate: Solitude, visit: Callable[..., Visitor]) -> None:
    first = visit(alone=False)
    wait(first.inside)
    waiting = [visit(alone=True), visit(alone=False)]
    gate.close()
    for visitor in [*waiting, visit(alone=False), visit(alone=True)]:
        wait(visitor.inside)
        assert visitor.entered is False
    assert first.entered is True


def test_an_error_inside_leaves_the_gate_open(gate: Solitude, visit: Callable[..., Visitor]) -> None:
    for door in (gate.company, gate.alone):
        with pytest.raises(MemoryError), door():
            raise MemoryError
    wait(visit(alone=True).inside)
