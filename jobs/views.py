"""What the store hands out: frozen values, no rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from jobs.errors import InvalidSpec
from jobs.spec import JobSpec
from jobs.states import TERMINAL, State


@dataclass(frozen=True, slots=True)
class Output:
    """One finished image: where it is and what it is. `seed` is the seed that drew it; sizes in pixels and bytes."""

    index: int
    key: str
    seed: int
    width: int
    height: int
    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as it was when it was read. Times are the database's, in UTC.

    stored: its spec, or why this version cannot read the one in its row; one such row must not hide all the others.
    traceback: of the last error. suspect: it was held by a worker that stopped answering, and is rendered alone.
    solo_crashes: the workers that it took with it while it was alone.
    """

    id: UUID
    state: State
    attempts: int
    error: str | None
    stored: JobSpec | InvalidSpec
    batch: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    images: tuple[Output, ...] = ()
    traceback: str | None = None
    suspect: bool = False
    solo_crashes: int = 0

    @property
    def spec(self) -> JobSpec:
        """What is rendered. Raises InvalidSpec when this version cannot read it."""
        if isinstance(self.stored, InvalidSpec):
            raise self.stored
        return self.stored

    @property
    def unreadable(self) -> InvalidSpec | None:
        """Why this version cannot read the spec."""
        return self.stored if isinstance(self.stored, InvalidSpec) else None

    @property
    def ended(self) -> bool:
        """Whether the queue is done with this job."""
        return self.state in TERMINAL


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's right to render a job; every write of the worker must carry its token.

    suspect: it may crash its process, so nothing else may be held beside it. saved_key: where a worker that had to
    leave kept its rows.
    """

    job_id: UUID
    token: UUID
    attempt: int
    spec: JobSpec
    worker_id: str
    suspect: bool = False
    saved_key: str | None = None


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A claim that the database may have granted: it did not say. All that one can do with it is to vouch for it."""

    job_id: UUID
    token: UUID


@dataclass(frozen=True, slots=True)
class Beat:
    """The tokens that a heartbeat found alive. A claim whose token is in neither set is lost."""

    held: frozenset[UUID]
    cancelled: frozenset[UUID]


@dataclass(frozen=True, slots=True)
class Sweep:
    """How many expired leases became what. requeued: suspects now, to be rendered alone."""

    requeued: int
    failed: int
    cancelled: int = 0


@dataclass(frozen=True, slots=True)
class Due:
    """A queued job whose bell should be rung."""

    id: UUID
    model: str
    priority: int
