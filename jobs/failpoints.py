"""Places where the fault suite makes our own code fail, so that a crash comes at the worst moment and not by chance.

Inert unless NIGHTSHIFT_FAILPOINT is set when the process starts: ``after_upload:kill9@p=0.05;step:sleep=0.5@nth=3``
kills the process at one in twenty uploads, and holds the third step for half a second. Conditions: ``p`` the
probability of each pass, ``nth`` this pass only (the first is 1), ``seed`` of the draws.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

VARIABLE = "NIGHTSHIFT_FAILPOINT"

#: Every place, and when it is passed.
PLACES: Mapping[str, str] = MappingProxyType(
    {
        "before_insert_commit": "submit: the rows are inserted, the transaction is open",
        "after_insert_commit": "submit: the rows are committed, no bell has rung",
        "before_claim_commit": "claim: the row is ours, the transaction is open",
        "after_claim_commit": "claim: committed, the worker has not got the answer",
        "after_claim": "the claim is committed, the engine has not heard of it",
        "step": "the engine's thread, before each step",
        "heartbeat": "before the statement that extends the leases",
        "before_upload": "the pictures are drawn, none is stored",
        "half_put": "storage in a directory: the bytes are in a file that has no name yet",
        "after_upload": "the pictures are stored, the database does not know",
        "before_finish_commit": "finish: the rows are changed, the transaction is open",
        "after_finish_commit": "finish: committed, the worker has not got the answer",
        "before_ack": "the job's story has ended, the broker does not know",
        "after_save": "a leaving worker stored its rows, the job is not released",
        "after_prune_note": "prune: what is about to go is written down, its rows are there",
        "after_prune_rows": "prune: the rows are gone, their objects are there",
    }
)


class Injected(OSError):
    """What the action ``raise`` raises."""


def _signal(number: int) -> Callable[[float], None]:
    return lambda _: os.kill(os.getpid(), number)


def _raise(kind: type[BaseException]) -> Callable[[float], None]:
    def act(_: float) -> None:
        raise kind("a failpoint asked for it")

    return act


def _hang(_: float) -> None:
    threading.Event().wait()


def _spin(_: float) -> None:
    # Backtracks for ages inside one call, which never lets go of the interpreter's lock.
    re.match(r"(a+)+$", "a" * 40 + "b")


#: What can happen there; some take ``=seconds``.
ACTIONS: Mapping[str, Callable[[float], None]] = MappingProxyType(
    {
        "kill9": _signal(signal.SIGKILL),
        "abort": lambda _: os.abort(),
        "stop": _signal(signal.SIGSTOP),
        "raise": _raise(Injected),
        "memory": _raise(MemoryError),
        "exit": _raise(SystemExit),
        "interrupt": _raise(KeyboardInterrupt),
        "sleep": time.sleep,
        "hang": _hang,
        "spin": _spin,
    }
)


@dataclass(slots=True)
class _Plan:
    act: Callable[[float], None]
    value: float
    p: float = 1.0
    nth: int | None = None
    rng: random.Random = field(default_factory=random.Random)
    passes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hit(self) -> None:
        with self.lock:
            self.passes += 1
            happens = self.nth in (None, self.passes) and self.rng.random() < self.p
        if happens:
            self.act(self.value)


def parse(text: str) -> dict[str, _Plan]:
    """The plans of a setting. Raises ValueError, in one sentence, for an unknown place, action or condition."""
    return dict(_parse_one(part.strip()) for part in text.split(";") if part.strip())


def _parse_one(text: str) -> tuple[str, _Plan]:
    what, _, conditions = text.partition("@")
    place, _, action = what.partition(":")
    name, _, value = action.partition("=")
    if place not in PLACES or name not in ACTIONS:
        raise ValueError(
            f"{VARIABLE}: {text!r} is not place:action; places are {', '.join(PLACES)}; actions {', '.join(ACTIONS)}"
        )
    plan = _Plan(ACTIONS[name], float(value or 0))
    for condition in filter(None, conditions.split(",")):
        key, _, number = condition.partition("=")
        match key:
            case "p":
                plan.p = float(number)
            case "nth":
                plan.nth = int(number)
            case "seed":
                plan.rng = random.Random(int(number))
            case _:
                raise ValueError(f"{VARIABLE}: {condition!r} is no condition; known are p, nth, seed")
    return place, plan


def _from_environment() -> Mapping[str, _Plan]:
    try:
        return parse(os.environ.get(VARIABLE, ""))
    except ValueError as error:
        # At import, before any command could tell it.
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


_plans: Mapping[str, _Plan] = _from_environment()


def failpoint(place: str) -> None:
    """Pass this place; nothing happens unless the process was started with a plan for it."""
    if _plans and place in _plans:
        _plans[place].hit()
