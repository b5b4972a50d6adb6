"""What `nightshift doctor` is made of: a check looks at one thing and says what it saw and what to do.

A package adds its checks by an entry point of the group `nightshift.checks`: a function from the settings to findings.
So the worker's half is looked at where it is installed, and nothing here imports upwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version

import sqlalchemy.exc

from jobs.errors import NightshiftError
from jobs.redaction import hide

GROUP = "nightshift.checks"


class Mark(StrEnum):
    """How a check ended. A warning is no reason not to render tonight; something that failed is."""

    ok = "ok"
    warning = "warning"
    failed = "failed"
    skipped = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. remedy: what to do, for whatever is not ok."""

    check: str
    mark: Mark
    seen: str
    remedy: str = ""


def looked(check: str, look: Callable[[], Iterable[Finding]], remedy: str) -> Iterator[Finding]:
    """The findings of one check; whatever it stumbles over is a failure with this remedy, and no end of the table."""
    try:
        yield from look()
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = getattr(error, "orig", None) or error
        yield Finding(check, Mark.failed, _line(reason), remedy)
    except (NightshiftError, OSError) as error:
        yield Finding(check, Mark.failed, _line(error), remedy)


def _line(error: object) -> str:
    return hide(" ".join(str(error).split())) or type(error).__name__


def above_floor(package: str, floor: tuple[int, ...]) -> Finding:
    """Whether the installed version is at least the oldest one that is safe and known to work."""
    check, wanted = f"{package} version", ".".join(map(str, floor))
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(check, Mark.failed, "not installed", f"pip install '{package}>={wanted}'")
    if _numbers(found)[: len(floor)] >= floor:
        return Finding(check, Mark.ok, f"{found}, at least {wanted} is needed")
    return Finding(check, Mark.failed, f"{found}, at least {wanted} is needed", f"pip install '{package}>={wanted}'")


def _numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        numbers.append(int(digits or 0))
    return tuple(numbers)


def installed_checks() -> list[EntryPoint]:
    """Every installed set of checks; the producer's first, since nothing works without what they look at."""
    return sorted(entry_points(group=GROUP), key=lambda point: (point.name != "jobs", point.name))
