"""The tie between a supervisor and its worker: the worker says each second that it lives, and notices when nobody
listens any more.

A pair of sockets, one end each and in no third hand, so a process that died is an end of file at the other, however it
died. Knows nothing of rendering, and is imported before torch is.
"""

import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

from worker.exit_codes import DONE

VARIABLE = "NIGHTSHIFT_LIFELINE"
BEAT_S = 1.0
ALIVE, READY = b".", b"!"


class Listening:
    """The supervisor's end. Start the child with ``environment`` and ``pass_fds``, then call ``started``."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)

    @property
    def pass_fds(self) -> tuple[int]:
        return (self._theirs.fileno(),)

    @property
    def environment(self) -> dict[str, str]:
        return {VARIABLE: str(self._theirs.fileno())}

    def started(self) -> None:
        """The child has its end; ours of it would hide that the child has died."""
        self._theirs.close()

    def hear(self) -> bytes:
        """All that the child has said since the last time."""
        said = b""
        with suppress(OSError):
            while part := self._ours.recv(4096):
                said += part
        return said

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


class Lifeline(threading.Thread):
    """The worker's end. ``orphaned`` is called once when the supervisor is gone; until somebody sets it (``tell``),
    nothing is held yet and the process simply ends."""

    def __init__(self, theirs: socket.socket) -> None:
        super().__init__(name="lifeline", daemon=True)
        self._socket = theirs
        self._socket.set_inheritable(False)
        # A supervisor that is stopped (Ctrl-Z) reads nothing: what does not fit is not worth waiting for.
        self._socket.setblocking(False)
        self._orphaned: Callable[[], None] = lambda: os._exit(DONE)

    @classmethod
    def from_environment(cls) -> "Lifeline | None":
        """That of the supervisor that started this process; None without one. The variable is taken away, so that
        processes which we start do not believe it theirs."""
        number = os.environ.pop(VARIABLE, "")
        if not number.isdecimal():
            return None
        try:
            return cls(socket.socket(fileno=int(number)))
        except OSError:  # a variable left over from somewhere else
            return None

    def tell(self, orphaned: Callable[[], None]) -> None:
        """From now on, call this when the supervisor is gone."""
        self._orphaned = orphaned

    def ready(self) -> None:
        """Say that the start has succeeded: an error from now on is worth a restart."""
        self._say(READY)

    def run(self) -> None:
        while not self._is_gone(BEAT_S):
            self._say(ALIVE)
        self._socket.close()
        self._orphaned()

    def _say(self, what: bytes) -> None:
        with suppress(OSError):  # full, or gone: the next look tells
            self._socket.send(what)

    def _is_gone(self, wait_s: float) -> bool:
        try:
            readable, _, _ = select.select([self._socket], [], [], wait_s)
            return bool(readable) and not self._socket.recv(16)
        except BlockingIOError:
            return False
        except OSError:
            return True
