"""Extends the leases of this worker, hears of lost and cancelled jobs, and stops trusting old leases by itself.

Three threads: a database may hang in each of the two that ask it, and neither may keep the others from their time.
"""

import logging
import time
from collections.abc import Callable

from jobs.store import Store
from worker.leases import Leases
from worker.periodic import Periodic
from worker.reasons import CancelAsked, LeaseLost

log = logging.getLogger(__name__)


class Heartbeat(Periodic):
    """One statement per beat for all leases that the worker holds.

    ``beat_s`` must be well below ``lease_s``: a third leaves room for two missed beats. Cancels are looked for every
    ``poll_s`` with a read that takes no lock. While ``step_moves`` says no, only drawn jobs are extended: a lease is
    for work that goes on.
    """

    def __init__(
        self,
        store: Store,
        leases: Leases,
        worker_id: str,
        *,
        lease_s: float,
        beat_s: float,
        poll_s: float,
        step_moves: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("heartbeat", after_error_s=poll_s)
        self._store, self._leases, self._worker_id = store, leases, worker_id
        self._lease_s, self._beat_s, self._poll_s = lease_s, beat_s, poll_s
        self._step_moves = step_moves
        self._clock = clock
        self._next_beat = 0.0

    def tick(self) -> float:
        if self._leases.held():
            self._beat_or_poll()
        return self._poll_s

    def _beat_or_poll(self) -> None:
        now = self._clock()
        if now >= self._next_beat:
            self.beat()
            self._next_beat = now + self._beat_s
        else:
            for token in self._store.cancel_requested(self._worker_id):
                self._leases.interrupt(token, CancelAsked("cancelled by request"))

    def beat(self) -> None:
        """Extend all leases now; interrupt what was lost or cancelled."""
        began = self._clock()  # before the statement: we must stop trusting a lease before the database does
        moves = self._step_moves()
        held = {token: lease for token, lease in self._leases.held().items() if moves or lease.drawn}
        beat = self._store.heartbeat(self._worker_id, held.keys(), lease_s=self._lease_s)
        self._leases.trust(beat.held | beat.cancelled, began)
        for token in beat.cancelled:
            self._leases.interrupt(token, CancelAsked("cancelled by request"))
        for token in held.keys() - beat.held - beat.cancelled:
            self._leases.interrupt(token, LeaseLost("the lease was taken over or ended"))


class Fence(Periodic):
    """Interrupts what was not extended for the length of a lease, whatever the database does meanwhile."""

    def __init__(
        self, leases: Leases, *, lease_s: float, look_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__("fence")
        self._leases, self._lease_s, self._look_s, self._clock = leases, lease_s, look_s, clock

    def tick(self) -> float:
        self._leases.fence(self._clock() - self._lease_s)
        return self._look_s


class Voucher(Periodic):
    """Tells the database of lost claims that their worker lives; each may take as long as a beat."""

    def __init__(self, store: Store, leases: Leases, *, look_s: float) -> None:
        super().__init__("voucher", after_error_s=look_s)
        self._store, self._leases, self._look_s = store, leases, look_s

    def tick(self) -> float:
        self._leases.vouch_for_lost(self._store.vouch)
        return self._look_s
