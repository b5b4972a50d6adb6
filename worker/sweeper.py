"""Puts expired leases back into the queue, and rings for rows that wait although this worker has room."""

import logging
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
    row's last bell must be before it is rung for again; ``sweep_s``: between looks for expired leases; while the
    worker is full ``listen_s``: between counts of urgent bells, and ``lookout_s``: between looks for urgent jobs in the
    database, where no bell calls for one."""

    busy_s: float
    idle_s: float
    bell_age_s: float
    sweep_s: float
    listen_s: float
    lookout_s: float


# The sweeper is the only bell: a row waits 0.1 s at most, one indexed read each time.
EMBEDDED = Pace(busy_s=0.1, idle_s=0.1, bell_age_s=5.0, sweep_s=2.0, listen_s=0.2, lookout_s=0.2)
# The broker rings; the sweeper repairs lost messages. Faster only while it really finds some (an emptied broker).
WITH_BROKER = Pace(busy_s=0.5, idle_s=5.0, bell_age_s=15.0, sweep_s=5.0, listen_s=0.1, lookout_s=2.0)


def pace_for(broker_url: str, lease_s: float) -> Pace:
    """The pace for this broker; never slower than a quarter of a lease (bells age in half of one), or short leases
    would wait for the sweeper."""
    pace = EMBEDDED if is_embedded(broker_url) else WITH_BROKER
    quarter_s = lease_s / 4
    return replace(
        pace,
        idle_s=min(pace.idle_s, quarter_s),
        bell_age_s=min(pace.bell_age_s, 2 * quarter_s),
        sweep_s=min(pace.sweep_s, quarter_s),
    )


class Sweeper(Periodic):
    """Puts expired leases back into the queue every ``sweep_s``.

    A thread of its own: a broker that hangs must not keep the jobs of a dead worker from the living.
    """

    def __init__(self, store: Store, sweep_s: float) -> None:
        super().__init__("sweeper", after_error_s=sweep_s)
        self._store, self._sweep_s = store, sweep_s

    def tick(self) -> float:
        swept = self._store.sweep()
        if swept.requeued or swept.failed or swept.cancelled:
            log.warning(
                "expired leases: %d jobs queued again, %d failed, %d cancelled",
                swept.requeued,
                swept.failed,
                swept.cancelled,
            )
        return self._sweep_s


class Ringer(Periodic):
    """Rings for rows that wait, for no more than the free slots less the bells that already wait in the broker: many
    ringers at once, or one that comes back every round, then never fill it beyond what somebody will answer.

    ``ring`` and ``waiting`` (bells of our models that nobody took yet) raise what the broker raises. Without
    ``waiting`` nobody else rings or listens, and a bell takes a slot from the moment when it is rung.
    """

    def __init__(
        self,
        store: Store,
        ring: Callable[[Due], None],
        slots: Slots,
        models: Sequence[str],
        pace: Pace,
        *,
        waiting: Callable[[], int] | None,
    ) -> None:
        super().__init__("ringer", after_error_s=pace.idle_s)
        self._store, self._ring, self._waiting, self._slots = store, ring, waiting, slots
        self._models, self._pace = tuple(models), pace
        self._finds = False

    def tick(self) -> float:
        missing = self._slots.free()
        if missing and self._waiting is not None:
            # Before rows are chosen: a broker that is away must not make their bells look fresh.
            missing -= self._waiting()
        if missing > 0:
            self._finds = self._ring_for_due(missing) > 0
        return self._pace.busy_s if self._finds else self._pace.idle_s

    def freed(self) -> None:
        """A slot is free. Where nobody else rings for it, or bells were lost, it would stay empty until the next
        round."""
        if self._waiting is None or self._finds:
            self.wake()

    def _ring_for_due(self, limit: int) -> int:
        due = self._store.due(limit, models=self._models, older_than_s=self._pace.bell_age_s)
        for row in due:
            if self._waiting is None:
                self._slots.ring(str(row.id))
            self._ring(row)
        return len(due)
