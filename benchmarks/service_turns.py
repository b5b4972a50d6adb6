"""Ways that draw the same jobs by turns of a second, so that a host whose speed changes meets all of them alike.

One run after the other will not do: the same work has been seen to take 41 CPU seconds and, a minute later, 59.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Stretch:
    """From the first job's submit to the last one's end; seconds since 1970."""

    began: float
    first_claim: float
    ended: float


@dataclass(frozen=True, slots=True)
class Turn:
    """From when to when, in seconds since 1970, and the CPU seconds of the servers meanwhile."""

    began: float
    ended: float
    servers_cpu_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """Jobs from the first to the last, in the turns of their way alone.

    Seconds: of the clock, of CPU in the drawing process and in the servers, and until the first claim.
    """

    wall_s: float
    own_cpu_s: float
    servers_cpu_s: float = 0.0
    first_claim_s: float = 0.0


class Way(Protocol):
    """A child process that draws jobs; it may be stopped at any moment."""

    @property
    def pid(self) -> int: ...

    def begin(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Hand them over; returns at once."""

    def ended(self) -> Stretch | None:
        """Of the jobs that began last; None until all are drawn."""


def draw_by_turns(
    ways: Mapping[str, Way],
    jobs: Sequence[Mapping[str, Any]],
    turn_s: float,
    cpu_s: Callable[[int], float],
    servers_cpu_s: Callable[[], float],
) -> dict[str, Run]:
    """All the jobs by every way, each of which is stopped while it is not its turn."""
    turns: dict[str, list[Turn]] = {name: [] for name in ways}
    runs: dict[str, Run] = {}
    own_cpu_s = {name: cpu_s(way.pid) for name, way in ways.items()}
    with _stopped(ways.values()):
        while len(runs) < len(ways):
            for name in [name for name in ways if name not in runs]:
                way = ways[name]
                begun = () if turns[name] else jobs
                turns[name].append(_turn(way, begun, turn_s, servers_cpu_s))
                if (stretch := way.ended()) is not None:
                    runs[name] = run_of(turns[name], stretch, cpu_s(way.pid) - own_cpu_s[name])
    return runs


@contextmanager
def _stopped(ways: Collection[Way]) -> Iterator[None]:
    """All stand still, and go on afterwards, whatever happened."""
    try:
        for way in ways:
            _stop(way.pid)
        yield
    finally:
        for way in ways:
            with suppress(ProcessLookupError):
                os.kill(way.pid, signal.SIGCONT)


def _turn(way: Way, begun: Sequence[Mapping[str, Any]], turn_s: float, servers_cpu_s: Callable[[], float]) -> Turn:
    """begun: the jobs to hand over, in the first turn."""
    servers, began = servers_cpu_s(), time.time()
    os.kill(way.pid, signal.SIGCONT)
    if begun:
        way.begin(begun)
    time.sleep(turn_s)
    _stop(way.pid)
    return Turn(began, time.time(), servers_cpu_s() - servers)


def _stop(pid: int) -> None:
    """Returns when it stands still; a signal alone is only a wish."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def run_of(turns: Sequence[Turn], stretch: Stretch, own_cpu_s: float) -> Run:
    """What of the stretch lies in the turns."""
    return Run(
        _common_s(turns, stretch.began, stretch.ended),
        own_cpu_s,
        sum(turn.servers_cpu_s for turn in turns),
        _common_s(turns, stretch.began, stretch.first_claim),
    )


def _common_s(turns: Sequence[Turn], began: float, ended: float) -> float:
    return sum(max(0.0, min(turn.ended, ended) - max(turn.began, began)) for turn in turns)
