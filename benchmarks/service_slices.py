"""Ways that draw the same jobs by turns of a second, so that a host whose speed changes meets all of them alike.

One run after the other will not do: the same work has been seen to take 41 CPU seconds and, a minute later, 59.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Stretch:
    """From the first job's submit to the last one's end; seconds since 1970."""

    began: float
    first_claim: float
    ended: float


@dataclass(frozen=True, slots=True)
class Slice:
    """A turn: when, and the CPU seconds of the drawing process and of the servers meanwhile."""

    began: float
    ended: float
    own_cpu_s: float = 0.0
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
    """A process that draws jobs; it may be stopped at any moment."""

    @property
    def pid(self) -> int: ...

    def begin(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        """Hand them over; returns at once."""

    def ended(self) -> Stretch | None:
        """Of the jobs that began last; None until all are drawn."""


def draw_by_turns(
    ways: Mapping[str, Way],
    jobs: Sequence[Mapping[str, Any]],
    slice_s: float,
    cpu_s: Callable[[int], float],
    servers_cpu_s: Callable[[], float],
) -> dict[str, Run]:
    """All the jobs by every way, each of which is stopped while it is not its turn."""
    slices: dict[str, list[Slice]] = {name: [] for name in ways}
    runs: dict[str, Run] = {}
    for way in ways.values():
        os.kill(way.pid, signal.SIGSTOP)
    try:
        while len(runs) < len(ways):
            for name, way in ways.items():
                if name in runs:
                    continue
                begin = () if slices[name] else (jobs,)
                slices[name].append(_turn(way, begin, slice_s, cpu_s, servers_cpu_s))
                stretch = way.ended()
                if stretch is not None:
                    runs[name] = run_of(slices[name], stretch)
    finally:
        for way in ways.values():
            os.kill(way.pid, signal.SIGCONT)
    return runs


def _turn(
    way: Way,
    begin: Sequence[Sequence[Mapping[str, Any]]],
    slice_s: float,
    cpu_s: Callable[[int], float],
    servers_cpu_s: Callable[[], float],
) -> Slice:
    own, servers, began = cpu_s(way.pid), servers_cpu_s(), time.time()
    os.kill(way.pid, signal.SIGCONT)
    for jobs in begin:
        way.begin(jobs)
    time.sleep(slice_s)
    os.kill(way.pid, signal.SIGSTOP)
    return Slice(began, time.time(), cpu_s(way.pid) - own, servers_cpu_s() - servers)


def run_of(slices: Sequence[Slice], stretch: Stretch) -> Run:
    """What of the stretch lies in the turns."""
    return Run(
        _common_s(slices, stretch.began, stretch.ended),
        sum(each.own_cpu_s for each in slices),
        sum(each.servers_cpu_s for each in slices),
        _common_s(slices, stretch.began, stretch.first_claim),
    )


def _common_s(slices: Sequence[Slice], began: float, ended: float) -> float:
    return sum(max(0.0, min(each.ended, ended) - max(each.began, began)) for each in slices)
