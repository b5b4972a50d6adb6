"""Takes in the jobs that somebody waits for, while bulk jobs fill all slots of this worker."""

import threading
from collections.abc import Callable, Sequence
from typing import Final

from jobs.fields import URGENT_PRIORITY
from jobs.store import Store
from worker.periodic import Periodic
from worker.slots import Slots

# A free worker answers a bell within that time; only then do the full ones look after it.
BELL_AGE_S: Final = 0.1


class Lookout(Periodic):
    """Tells the story of urgent jobs on threads of its own while Celery's are all taken, so that nobody hears a bell.

    Their bells stay in the broker, and harm nobody when they are answered later: the claim refuses. So this asks the
    database, by one read at the top of an index, and only while the worker is full.
    ``story``: of a job, by its id; it never raises. ``most``: jobs at once; more of them wait for the slots.
    """

    def __init__(
        self,
        store: Store,
        slots: Slots,
        models: Sequence[str],
        story: Callable[[str], None],
        *,
        most: int,
        look_s: float,
    ) -> None:
        super().__init__("lookout")
        self._store, self._slots, self._models, self._story = store, slots, tuple(models), story
        self._most, self._look_s = most, look_s
        self._inside: list[threading.Thread] = []

    def tick(self) -> float:
        self._inside = [thread for thread in self._inside if thread.is_alive()]
        room = self._most - len(self._inside)
        if room > 0 and self._slots.full():
            for due in self._store.due(
                room, models=self._models, older_than_s=BELL_AGE_S, priority_from=URGENT_PRIORITY
            ):
                # daemon: a story that never ends must not keep a leaving process alive
                thread = threading.Thread(target=self._story, args=(str(due.id),), name=f"urgent-{due.id}", daemon=True)
                thread.start()
                self._inside.append(thread)
        return self._look_s

    def finish(self) -> None:
        """Look no more, and return once the stories that were begun have ended."""
        self.stop()
        self.join()
        for thread in self._inside:
            thread.join()
