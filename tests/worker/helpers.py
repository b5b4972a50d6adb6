"""Pieces that several tests of the worker share."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import uuid4

from jobs.spec import JobSpec
from jobs.views import Claim
from tests.fakes import FakeEngine

PATIENCE_S = 20.0
"""How long a test waits for an event that must come; never reached when all is well."""


def make_claim(**fields: object) -> Claim:
    spec = JobSpec.model_validate({"prompt": "a red star", "seed": 5, "steps": 3} | fields)
    return Claim(uuid4(), uuid4(), 1, spec, "host:1:test")


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE_S), "the event did not come"


@dataclass
class Gate:
    """Holds the engine before each step until it is opened; ``reached`` is set once a step waits at it."""

    reached: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, engine: FakeEngine) -> None:
        self.reached.set()
        wait(self.opened)


@dataclass
class Clock:
    """A monotonic clock that moves when told."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def once(action: Callable[[], object]) -> Callable[[object], None]:
    """A ``before_step`` that acts on the first step only."""
    done: list[bool] = []

    def act(_: object) -> None:
        if not done:
            done.append(True)
            action()

    return act
