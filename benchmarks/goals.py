"""What a benchmark is to reach, what it reached, and the spread of what it measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Goal:
    """A line of the goals. why: for one that was not reached, what was measured that explains it."""

    goal: str
    reached: float
    passed: bool
    why: str = ""

    @property
    def line(self) -> str:
        """The goal as it stands in a table."""
        because = f" ({self.why})" if self.why else ""
        return f"{'reached' if self.passed else 'MISSED '}  {self.goal}: {self.reached:g}{because}"


def at_least(goal: str, reached: float, bound: float, why: str = "") -> Goal:
    """A goal that is reached from the bound on."""
    return Goal(goal, round(reached, 4), reached >= bound, "" if reached >= bound else why)


def at_most(goal: str, reached: float, bound: float, why: str = "") -> Goal:
    """A goal that is reached up to the bound."""
    return Goal(goal, round(reached, 4), reached <= bound, "" if reached <= bound else why)


def as_json(goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """The goals for a result's JSON."""
    return [asdict(goal) for goal in goals]


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float | int]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
        "count": len(values),
    }
