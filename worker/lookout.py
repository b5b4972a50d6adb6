"""Takes in the jobs that somebody waits for, while bulk jobs fill all slots of this worker."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from jobs.fields import URGENT_PRIORITY
from jobs.store import Store
from worker.periodic import Periodic
from worker.slots import Slots
from worker.sweeper import Pace

log = logging.getLogger(__name__)

# A free worker answers a bell within that time; only then do the full ones look after it.
BELL_AGE_S: Final = 0.05


class Lookout(Periodic):
    """Tells the story of urgent jobs on threads of its own while Celery's are all taken, so that nobody hears a bell.

    Their bells stay in the broker, and harm nobody when they are answered later: the claim refuses. So this counts
    them, only while the worker is full, and where there are more than before it asks the database, by one read at the
    top of an index. It asks now and then anyway: a bell may be lost, or lie with a worker that hangs.
    ``story``: of a job, by its id; it never raises. ``most``: jobs at once; more of them wait for the slots.
    ``bells``: of urgent jobs that nobody took; raises what the broker raises. None: nobody rings from outside.
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        models: Sequence[str],
        story: Callable[[str], None],
        pace: Pace,
        *,
        most: int,
        bells: Callable[[], int] | None,
        clock: Callable[[], float],
    ) -> None:
        super().__init__("lookout")
        self._store, self._slots, self._models, self._story = store, slots, tuple(models), story
        self._pace, self._most, self._bells, self._clock = pace, most, bells, clock
        self._inside: list[threading.Thread] = []
        self._heard = self._begun = 0
        self._away = False
        self._look_at = self._risen_at = float("-inf")

    def tick(self) -> float:
        if not self._slots.full():
            return self._pace.listen_s
        self._listen()
        now = self._clock()
        self._inside = [thread for thread in self._inside if thread.is_alive()]
        room = self._most - len(self._inside)
        if room > 0 and now >= self._look_at:
            self._look_at = self._next_look(now, self._take_in(room))
        soon_s = self._look_at - now
        return soon_s if 0 < soon_s < self._pace.listen_s else self._pace.listen_s

    def _listen(self) -> None:
        """More bells than before: look, when free workers have had time to answer them."""
        if self._slots.begun != self._begun:
            # There was a free slot, which may have taken a bell that was counted: the same count may be another bell.
            self._heard, self._begun = 0, self._slots.begun
        bells = self._count()
        if bells > self._heard:
            self._risen_at = self._clock()
            self._look_at = min(self._look_at, self._risen_at + BELL_AGE_S)
        self._heard = bells

    def _next_look(self, now: float, found: int) -> float:
        if found:
            return now + self._pace.listen_s  # where there was one there may be more
        old_enough_at = self._risen_at + BELL_AGE_S
        # A bell that was heard just before was too young for this look.
        return old_enough_at if now < old_enough_at else now + self._pace.lookout_s

    def _count(self) -> int:
        if self._bells is None:
            return 0
        try:
            bells, away = self._bells(), False
        except Exception as error:  # of the broker, of whichever kind: then the looks now and then must do
            bells, away = 0, True
            if not self._away:
                log.warning("the broker counts no urgent bells (%s: %s)", type(error).__name__, error)
        self._away = away
        return bells

    def _take_in(self, room: int) -> int:
        """Begin the stories of the jobs that are due, so many at most -> how many they are."""
        due = self._store.due(room, models=self._models, older_than_s=BELL_AGE_S, priority_from=URGENT_PRIORITY)
        for job in due:
            # daemon: a story that never ends must not keep a leaving process alive
            thread = threading.Thread(target=self._story, args=(str(job.id),), name=f"urgent-{job.id}", daemon=True)
            thread.start()
            self._inside.append(thread)
        return len(due)

    def finish(self) -> None:
        """Look no more, and return once the stories that were begun have ended."""
        self.stop()
        self.join()
        for thread in self._inside:
            thread.join()
