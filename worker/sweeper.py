"""Rings for rows that wait although this worker has room, and puts expired leases back into the queue."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from jobs.store import Store
from jobs.views import Due
from worker.app import is_embedded
from worker.periodic import Periodic
from worker.slots import Slots

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds. ``busy_s``: between rounds while rows are being found, ``idle_s``: otherwise; ``bell_age_s``: how old a
    row's last bell must be before it is rung for again; ``sweep_s``: between looks for expired leases."""

    busy_s: float
    idle_s: float
    bell_age_s: float
    sweep_s: float


# The sweeper is the only bell: a row waits 0.2 s at most, one indexed read each time.
EMBEDDED = Pace(busy_s=0.2, idle_s=0.2, bell_age_s=5.0, sweep_s=2.0)
# The broker rings; the sweeper repairs lost messages. Faster only while it really finds some (an emptied broker).
WITH_BROKER = Pace(busy_s=0.5, idle_s=5.0, bell_age_s=15.0, sweep_s=5.0)


def pace_for(broker_url: str, lease_s: float) -> Pace:
    """The pace for this broker; never slower than a quarter of a lease, or short leases would wait for the sweeper."""
    pace = EMBEDDED if is_embedded(broker_url) else WITH_BROKER
    return replace(pace, idle_s=min(pace.idle_s, lease_s / 4), sweep_s=min(pace.sweep_s, lease_s / 4))


class Sweeper(Periodic):
    """Never rings for more than the free slots: a worker that is busy hears enough bells, so messages stay few."""

    def __init__(
        self,
        store: Store,
        ring: Callable[[Due], None],
        slots: Slots,
        models: Sequence[str],
        pace: Pace,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__("sweeper", after_error_s=pace.idle_s)
        self._store, self._ring, self._slots = store, ring, slots
        self._models, self._pace, self._clock = tuple(models), pace, clock
        self._next_sweep = 0.0

    def tick(self) -> float:
        if self._clock() >= self._next_sweep:
            self._next_sweep = self._clock() + self._pace.sweep_s
            self._put_back_expired()
        return self._pace.busy_s if self._ring_for_due() else self._pace.idle_s

    def _put_back_expired(self) -> None:
        swept = self._store.sweep()
        if swept.requeued or swept.failed or swept.cancelled:
            log.warning(
                "expired leases: %d jobs queued again, %d failed, %d cancelled",
                swept.requeued,
                swept.failed,
                swept.cancelled,
            )

    def _ring_for_due(self) -> int:
        free = self._slots.free()
        if not free:
            return 0
        due = self._store.due(free, models=self._models, older_than_s=self._pace.bell_age_s)
        for row in due:
            self._slots.ring(str(row.id))
            self._ring(row)
        return len(due)
