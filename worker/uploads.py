"""Finished pictures wait here for the storage, so that the engine never does."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

log = logging.getLogger(__name__)

#: Enough to hide the time of a put behind the next steps; they encode too, and must leave the engine its core.
THREADS = 8


class Uploads:
    """Runs one delivery per finished job beside the engine, on a few threads.

    Bounded: at most ``limit`` jobs keep their bytes here. While the storage is away ``put`` makes its caller wait,
    and a worker whose callers wait claims nothing more: pictures that nobody can store are not drawn.
    """

    def __init__(self, limit: int, *, threads: int = THREADS) -> None:
        self._room = threading.Semaphore(limit)
        self._deliveries: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._changed = threading.Condition()
        self._inside = 0
        for number in range(threads):
            # daemon: a put that never returns must not keep a leaving process alive
            threading.Thread(target=self._serve, name=f"upload-{number}", daemon=True).start()

    def put(self, delivery: Callable[[], None], *, check: Callable[[], None]) -> None:
        """Run ``delivery`` soon; waits while there is no room, and ``check`` may end that waiting by raising."""
        while not self._room.acquire(timeout=0.2):
            check()
        with self._changed:
            self._inside += 1
        self._deliveries.put(delivery)

    def inside(self) -> int:
        """Jobs whose pictures are here."""
        with self._changed:
            return self._inside

    def join(self) -> None:
        """Return once nothing is inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._inside)

    def _serve(self) -> None:
        while True:
            delivery = self._deliveries.get()
            try:
                delivery()
            except BaseException:  # the thread must outlive whatever a delivery raises
                log.exception("a delivery raised")
            finally:
                del delivery  # its pictures must not wait for the next one to come
                self._room.release()
                with self._changed:
                    self._inside -= 1
                    self._changed.notify_all()
