"""Ends a process that stopped hearing: a consumer can lose its broker without an error, and would sleep for days."""

import logging
import os
import time
from collections.abc import Callable

from jobs.store import Store
from worker.exit_codes import NOT_CONSUMING
from worker.periodic import Periodic
from worker.slots import Slots

log = logging.getLogger(__name__)


def patience_for(lease_s: float) -> float:
    """Seconds of deafness that end the process: two leases, and longer than a consumer needs to find its broker."""
    return max(20.0, 2 * lease_s)


class Liveness(Periodic):
    """Looks whether bells lie in the broker that this idle worker should have heard long ago.

    ``waiting``: bells of our models in the broker that nobody took; it raises when the broker is away, which is no
    fault of ours. An idle consumer is given a bell at once, so bells that lie there for ``patience_s``, while no task
    runs or has begun and rows could be claimed, are proof enough. ``held``: jobs that would be lost with the process,
    for their pictures still wait for the storage.
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        waiting: Callable[[], int],
        models: tuple[str, ...],
        *,
        patience_s: float,
        held: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        exit: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__("liveness", after_error_s=patience_s / 10)
        self._store, self._slots, self._waiting, self._models = store, slots, waiting, models
        self._patience_s, self._held, self._clock, self._exit = patience_s, held, clock, exit
        self._deaf_since: float | None = None
        self._begun = -1

    def tick(self) -> float:
        since, self._deaf_since = self._deaf_since, None  # what raises below has seen nothing
        if self._is_idle() and self._waiting():
            self._deaf_since = self._clock() if since is None else since
            if self._clock() - self._deaf_since >= self._patience_s:
                self._leave_if_rows_wait()
        return self._patience_s / 10

    def _is_idle(self) -> bool:
        begun, before = self._slots.begun, self._begun
        self._begun = begun
        return begun == before and not self._slots.busy() and not self._held() and not self._slots.closed

    def _leave_if_rows_wait(self) -> None:
        if self._store.claimable(self._models):
            log.critical("no bell was heard for %.0f s although rows and bells wait; leaving", self._patience_s)
            self._exit(NOT_CONSUMING)
