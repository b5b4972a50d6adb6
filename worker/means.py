"""Ends a process that cannot open a file or start a thread any more: it would take that for trouble of the storage or
the broker and wait for them for ever."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from worker.exit_codes import BROKEN
from worker.periodic import Periodic

log = logging.getLogger(__name__)

#: What one job needs at least, beyond what is open anyway: an object, and connections to store it.
SPARE_FILES = 4
LOOK_S = 2.0
#: So many looks in a row without; one may fall into a peak.
LOOKS = 3


class Means(Periodic):
    """Tries what everything here needs. ``give_back`` is called before the process leaves; it may fail."""

    def __init__(self, give_back: Callable[[], None], *, exit: Callable[[int], None] = os._exit) -> None:
        super().__init__("means")
        self._give_back, self._exit = give_back, exit
        self._failed = 0

    def tick(self) -> float:
        lacks = what_lacks()
        self._failed = self._failed + 1 if lacks else 0
        if self._failed >= LOOKS:
            self._leave(lacks)
        return LOOK_S

    def _leave(self, lacks: str) -> None:
        log.critical("this process has no means to work with any more (%s); it leaves", lacks)
        try:
            self._give_back()
        except Exception as error:
            log.warning("not given back, the leases will expire: %s", error)
        self._exit(BROKEN)


def what_lacks() -> str:
    """The system's own words, or nothing when there is enough."""
    try:
        with ExitStack() as stack:
            for _ in range(SPARE_FILES):
                stack.enter_context(_file())
        thread = threading.Thread(target=_nothing, name="probe", daemon=True)
        thread.start()
        thread.join()
    except (OSError, RuntimeError, MemoryError) as error:
        return str(error) or type(error).__name__
    return ""


@contextmanager
def _file() -> Iterator[None]:
    descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        os.close(descriptor)


def _nothing() -> None:
    pass
