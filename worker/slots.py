"""How many more jobs this process can take: Celery threads less running tasks, less bells not yet answered."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Slots:
    """Counts task threads. Thread-safe. ``on_free`` is called when a task has ended.

    ``forget_s``: a rung job that did not start here by then was taken by another worker (or its message was lost);
    it stops occupying a slot.
    """

    def __init__(self, limit: int, *, forget_s: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self.closed = False
        #: Tasks that have started since the process did.
        self.begun = 0
        self.on_free: Callable[[], None] = _nothing
        self._forget_s = forget_s
        self._clock = clock
        self._busy = 0
        self._rung: dict[str, float] = {}
        self._lock = threading.Lock()

    def free(self) -> int:
        """Jobs that may be rung for now."""
        now = self._clock()
        with self._lock:
            self._rung = {job: at for job, at in self._rung.items() if now - at < self._forget_s}
            return 0 if self.closed else max(0, self.limit - self._busy - len(self._rung))

    def close(self) -> None:
        """The process leaves: no room for anything more."""
        self.closed = True

    def busy(self) -> int:
        """Tasks that run now."""
        with self._lock:
            return self._busy

    def full(self) -> bool:
        """Whether tasks run on all of them, so that no bell is heard here; not in a process that leaves."""
        with self._lock:
            return not self.closed and self._busy >= self.limit

    def ring(self, job_id: str) -> None:
        """A message for ``job_id`` is about to be sent."""
        with self._lock:
            self._rung[job_id] = self._clock()

    @contextmanager
    def take(self, job_id: str) -> Iterator[None]:
        """The task of ``job_id`` runs while the block runs."""
        with self._lock:
            self._rung.pop(job_id, None)
            self._busy += 1
            self.begun += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
            self.on_free()


def _nothing() -> None:
    pass
