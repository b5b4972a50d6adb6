"""One child process per device: restarts the dead with back-off, forwards signals, leaves with its children.

Knows nothing of rendering: it supervises any commands.
"""

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType

from worker.exit_codes import DONE, WRONG_SETTINGS

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BackOff:
    """Seconds before a restart: ``first_s``, doubled up to ``most_s``, and anew after a life of ``forgiven_s``."""

    first_s: float = 1.0
    most_s: float = 60.0
    forgiven_s: float = 60.0

    def after(self, wait_s: float, lived_s: float) -> float:
        """The wait after ``wait_s`` for a child that lived ``lived_s``."""
        return self.first_s if lived_s >= self.forgiven_s or not wait_s else min(2 * wait_s, self.most_s)


@dataclass(slots=True, eq=False)
class _Child:
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    wait_s: float = 0.0
    restart_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Exited:
    child: _Child
    code: int


@dataclass(frozen=True, slots=True)
class _Signalled:
    number: int


class Supervisor:
    """Runs ``commands`` until each is done (exit 0 or 2) or until it is told to stop.

    ``grace_s``: seconds that children have after the first signal before they are killed; a second signal changes
    nothing. ``run`` returns 0, or 2 when a child ended with wrong settings.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        grace_s: float,
        back_off: BackOff = BackOff(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = [_Child(command) for command in commands]
        self._grace_s, self._back_off, self._clock = grace_s, back_off, clock
        self._events: SimpleQueue[_Exited | _Signalled] = SimpleQueue()
        self._stopping = False
        self._kill_at: float | None = None
        self._result = DONE

    def install_signal_handlers(self) -> None:
        """SIGTERM and SIGINT are forwarded as SIGTERM. Call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ask all children to leave. From any thread or signal handler."""
        self._events.put(_Signalled(number))

    def pids(self) -> list[int]:
        """Process ids of the children that run now."""
        return [child.process.pid for child in self._children if child.process is not None]

    def run(self) -> int:
        """Start all children and stay until none is left."""
        for child in self._children:
            self._start(child)
        while any(child.process or child.restart_at is not None for child in self._children):
            self._wait_for_event()
            self._keep_times()
        return self._result

    def _start(self, child: _Child) -> None:
        child.restart_at, child.started_at = None, self._clock()
        # Its own process group: Ctrl-C at the terminal then reaches children once, through us, not twice.
        child.process = subprocess.Popen(child.command, process_group=0)
        threading.Thread(target=self._await_exit, args=(child, child.process), daemon=True).start()
        log.info("started %d: %s", child.process.pid, " ".join(child.command))

    def _await_exit(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        self._events.put(_Exited(child, process.wait()))

    def _wait_for_event(self) -> None:
        times = [child.restart_at for child in self._children if child.restart_at is not None]
        times += [self._kill_at] if self._kill_at is not None else []
        wait_s = max(0.0, min(times) - self._clock()) if times else None
        try:
            event = self._events.get(timeout=wait_s)
        except Empty:
            return
        match event:
            case _Signalled():
                self._forward()
            case _Exited(child, code):
                self._bury(child, code)

    def _keep_times(self) -> None:
        now = self._clock()
        for child in self._children:
            if child.restart_at is not None and now >= child.restart_at:
                self._start(child)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._signal_all(signal.SIGKILL)

    def _forward(self) -> None:
        if not self._stopping:
            self._stopping, self._kill_at = True, self._clock() + self._grace_s
        for child in self._children:
            child.restart_at = None
        self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: int) -> None:
        for child in self._children:
            if child.process is not None:
                child.process.send_signal(number)

    def _bury(self, child: _Child, code: int) -> None:
        pid = child.process.pid if child.process else 0
        child.process = None
        if self._stopping or code == DONE:
            return
        if code == WRONG_SETTINGS:
            log.error("%d ended with wrong settings and is not started again", pid)
            self._result = WRONG_SETTINGS
            return
        now = self._clock()
        child.wait_s = self._back_off.after(child.wait_s, now - child.started_at)
        child.restart_at = now + child.wait_s
        log.warning("%d ended with %d; starting it again in %.1f s", pid, code, child.wait_s)
