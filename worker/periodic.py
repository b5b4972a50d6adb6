"""A thread that does one small thing again and again, and survives its failures."""

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from worker.exit_codes import BROKEN

log = logging.getLogger(__name__)


class Periodic(threading.Thread, ABC):
    """Calls ``tick`` until stopped; ``tick`` returns the seconds to wait before the next call."""

    #: Ends the process; a test puts another in its place.
    die: Callable[[int], None] = staticmethod(os._exit)

    def __init__(self, name: str, *, after_error_s: float = 1.0) -> None:
        super().__init__(name=name, daemon=True)
        self._after_error_s = after_error_s
        self._stopped = False
        self._woken = threading.Event()

    @abstractmethod
    def tick(self) -> float:
        """Do the work once; seconds until the next time. What it raises is logged and the thread goes on."""

    def run(self) -> None:
        try:
            self._go_on()
        except BaseException:
            # A worker without its heartbeat, its fence or its sweeper would seem to live, and be wrong for ever.
            log.critical("the thread %s died; the process leaves", self.name, exc_info=True)
            self.die(BROKEN)

    def _go_on(self) -> None:
        wait_s = 0.0
        while True:
            self._woken.wait(wait_s)
            self._woken.clear()
            if self._stopped:
                return
            try:
                wait_s = self.tick()
            except Exception as error:
                # The thread must outlive a database or broker that is away for a while.
                log.warning("%s: %s: %s", self.name, type(error).__name__, error)
                wait_s = self._after_error_s

    def stop(self) -> None:
        """Ask the thread to end; returns at once."""
        self._stopped = True
        self._woken.set()

    def wake(self) -> None:
        """Do the work now rather than at the time that was planned."""
        self._woken.set()
