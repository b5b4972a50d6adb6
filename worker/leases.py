"""The claims this process holds right now, shared by the task threads and the heartbeat."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from jobs.views import Claim, Unanswered
from worker.reasons import Interrupted, LeaseLost

#: While the database is away each bell leaves a claim without an answer. Those that are forgotten here wait for their
#: lease.
MOST_LOST = 1000


@dataclass(slots=True)
class Lease:
    """One held claim. ``trusted_since``: a monotonic time *before* the statement that last extended it; ``stored``:
    the keys of the objects under it that may be there and that no row names; ``drawn``: the engine is done with it."""

    claim: Claim
    trusted_since: float
    reason: Interrupted | None = None
    stored: list[str] = field(default_factory=list)
    drawn: bool = False
    _interrupted: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise the reason when the claim was interrupted meanwhile; looked at between the stages of a job."""
        if self.reason is not None:
            raise self.reason

    def pause(self, seconds: float) -> None:
        """Wait that long, or until the claim is interrupted; then raise the reason."""
        self._interrupted.wait(seconds)
        self.check()

    def interrupt(self, reason: Interrupted) -> None:
        """Only the first reason counts."""
        self.reason = self.reason or reason
        self._interrupted.set()


class Leases:
    """Held claims by token. ``interrupt`` is called with a token and a reason, from the heartbeat's thread.

    ``lost``: claims whose lease ran out, or that got no answer, while this process lived, until the database has heard
    that it does.
    """

    def __init__(self, interrupt: Callable[[UUID, Interrupted], None]) -> None:
        self._interrupt_rows = interrupt
        self._held: dict[UUID, Lease] = {}
        self._lost: dict[UUID, Claim | Unanswered] = {}
        self._lock = threading.Lock()

    def take(self, claim: Claim, since: float) -> Lease:
        """Register ``claim`` for the heartbeat."""
        lease = Lease(claim, since)
        with self._lock:
            self._held[claim.token] = lease
        return lease

    def drop(self, lease: Lease) -> None:
        """The claim has ended, or is left to its lease. Harmless when repeated."""
        with self._lock:
            self._held.pop(lease.claim.token, None)

    def lose(self, claim: Claim | Unanswered) -> None:
        """Remember a claim whose lease ran out, or whose answer never came, although this process lives."""
        with self._lock:
            if len(self._lost) >= MOST_LOST:
                del self._lost[next(iter(self._lost))]
            self._lost[claim.token] = claim

    def vouch_for_lost(self, tell: Callable[[Claim | Unanswered], object]) -> None:
        """Tell the database of each lost claim; those for which it does not answer stay for the next time."""
        with self._lock:
            lost = list(self._lost.values())
        for claim in lost:
            tell(claim)
            with self._lock:
                self._lost.pop(claim.token, None)

    def held(self) -> dict[UUID, Lease]:
        """A snapshot: claims taken later are not in it, so a beat that began earlier cannot call them lost."""
        with self._lock:
            return dict(self._held)

    def trust(self, tokens: frozenset[UUID], since: float) -> None:
        """The database extended these leases in a statement that began at ``since``."""
        with self._lock:
            for token in tokens & self._held.keys():
                self._held[token].trusted_since = since

    def interrupt(self, token: UUID, reason: Interrupted) -> None:
        """Take the rows of ``token`` out of the engine. Harmless when repeated, and for a token not held any more."""
        with self._lock:
            lease = self._held.get(token)
            if lease is None:
                return
            lease.interrupt(reason)
        self._interrupt_rows(token, reason)

    def fence(self, older_than: float) -> list[UUID]:
        """Interrupt every lease that was last extended before ``older_than``: another worker may own the job by now."""
        stale = [token for token, lease in self.held().items() if lease.trusted_since < older_than]
        for token in stale:
            self.interrupt(token, LeaseLost("the database was out of reach for longer than the lease"))
        return stale
