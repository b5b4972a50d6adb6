"""Jobs are drawn in company; one that may crash its process is drawn alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Solitude:
    """A gate before the claim: many may be inside together, or one alone. Thread-safe.

    Who wants to be alone goes before newcomers, or a busy worker would never draw a suspect. Nobody who waits here
    holds a claim, so a process that dies meanwhile takes nothing of theirs along.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together = 0
        self._alone = False
        self._want_alone = 0
        self._closed = False

    @contextmanager
    def company(self) -> Iterator[bool]:
        """Inside with others while the block runs; False when the process leaves and nobody may enter."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self._alone or self._want_alone))
            entered = not self._closed
            self._together += entered
        try:
            yield entered
        finally:
            with self._changed:
                self._together -= entered
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Inside with nobody else while the block runs; False when the process leaves and nobody may enter."""
        with self._changed:
            self._want_alone += 1
            self._changed.wait_for(lambda: self._closed or not (self._alone or self._together))
            self._want_alone -= 1
            entered = not self._closed
            self._alone = self._alone or entered
        try:
            yield entered
        finally:
            with self._changed:
                self._alone = self._alone and not entered
                self._changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more; those who wait are told so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
