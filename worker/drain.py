"""Leaving in time: SIGTERM or SIGINT -> nothing new, finish what fits the grace time, release the rest, exit 0."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from types import FrameType

from worker.exit_codes import DONE

log = logging.getLogger(__name__)

#: Of the grace time: rendering may take this much, the rest is for uploads and the last statements.
RENDER_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class DrainSteps:
    """What a drain does, in order. ``admit_nothing``: at once; ``finish_until``: with the engine's deadline;
    ``stop_consuming``: Celery; ``release_all``: at the end of the grace time, when tasks still hang somewhere."""

    admit_nothing: Callable[[], None]
    finish_until: Callable[[float], None]
    stop_consuming: Callable[[], None]
    release_all: Callable[[], None]
    exit: Callable[[int], None] = os._exit


class Drain(threading.Thread):
    """Waits for the request to leave. ``request`` may be called from a signal handler, any number of times."""

    def __init__(self, steps: DrainSteps, *, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name="drain", daemon=True)
        self._steps, self._grace_s, self._clock = steps, grace_s, clock
        # SimpleQueue.put is reentrant: a second signal inside the first handler cannot deadlock, as Event.set could.
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._left = threading.Event()

    def request(self, why: str) -> None:
        """Begin to leave. Only the first request counts."""
        self._asked.put(why)

    def install_signal_handlers(self) -> None:
        """SIGTERM and SIGINT ask for the drain and do nothing else. Call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)

    def left(self) -> None:
        """The process is about to end in the ordinary way: the watchdog is not needed any more."""
        self._left.set()

    def run(self) -> None:
        why = self._asked.get()
        deadline = self._clock() + self._grace_s
        log.info("%s: leaving within %.0f s", why, self._grace_s)
        self._try(self._steps.admit_nothing)
        self._try(lambda: self._steps.finish_until(self._clock() + RENDER_SHARE * self._grace_s))
        self._try(self._steps.stop_consuming)
        if not self._left.wait(deadline - self._clock() - min(2.0, 0.1 * self._grace_s)):
            self._leave_now()

    def _leave_now(self) -> None:
        """Something hangs (an upload, the broker): hand the jobs back and go."""
        log.warning("grace time is over: releasing what is left")
        self._try(self._release_for_a_moment)
        self._steps.exit(DONE)

    def _release_for_a_moment(self) -> None:
        # A thread of its own: a database that hangs must not hold us, and the leases will expire.
        releasing = threading.Thread(target=self._try, args=(self._steps.release_all,), daemon=True)
        releasing.start()
        releasing.join(min(1.5, 0.08 * self._grace_s))

    def _try(self, step: Callable[[], None]) -> None:
        """Whatever a step raises, the next ones follow: without them the process would never leave."""
        try:
            step()
        except Exception as error:
            log.warning("while leaving: %s: %s", type(error).__name__, error)
