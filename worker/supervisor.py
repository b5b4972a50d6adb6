"""One child process per device: restarts the dead and the hung with back-off, forwards signals, leaves with its
children.

Knows nothing of rendering: it supervises any commands.
"""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from types import FrameType

from worker.exit_codes import DONE, HUNG, WRONG_SETTINGS
from worker.lifeline import READY, Listening

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
    line: Listening | None = None
    silent_s: float = 0.0
    heard: bool = False
    killed: bool = False
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
    nothing. ``hang_limit_s``: a child that says nothing on its lifeline (``worker.lifeline``) for so long is killed and
    started again; None for commands that know of no lifeline. Before its first word it has ``start_s`` at least: on a
    busy machine Python and its imports take longer than a short limit. ``run`` returns 0, 2 when a child ended with
    wrong settings, or the code of the last child when all ended with an error before any was ready.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        grace_s: float,
        hang_limit_s: float | None = None,
        start_s: float = 60.0,
        back_off: BackOff = BackOff(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._children = [_Child(command) for command in commands]
        self._grace_s, self._hang_limit_s, self._back_off, self._clock = grace_s, hang_limit_s, back_off, clock
        self._start_s = start_s
        self._look_s = None if hang_limit_s is None else min(1.0, hang_limit_s / 4)
        self._looked_at = clock()
        self._events: SimpleQueue[_Exited | _Signalled] = SimpleQueue()
        self._stopping = self._any_was_ready = False
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
            self._listen()
            self._keep_times()
        return self._result

    def _start(self, child: _Child) -> None:
        child.restart_at, child.started_at = None, self._clock()
        child.silent_s, child.heard, child.killed = 0.0, False, False
        try:
            child.process = self._spawn(child)
            threading.Thread(target=self._await_exit, args=(child, child.process), daemon=True).start()
        except (OSError, RuntimeError) as error:  # no memory, no file, no thread to be had just now
            if child.process is None:
                self._start_later(child, f"not started: {error}")
                return
            child.process.kill()
            self._bury(child, child.process.wait())
            return
        log.info("started %d: %s", child.process.pid, " ".join(child.command))

    def _spawn(self, child: _Child) -> subprocess.Popen[bytes]:
        # Its own process group: Ctrl-C at the terminal then reaches children once, through us, not twice.
        if self._hang_limit_s is None:
            return subprocess.Popen(child.command, process_group=0)
        line = Listening()
        try:
            process = subprocess.Popen(
                child.command, process_group=0, pass_fds=line.pass_fds, env=os.environ | line.environment
            )
        except BaseException:
            line.close()
            raise
        line.started()
        child.line = line
        return process

    def _await_exit(self, child: _Child, process: subprocess.Popen[bytes]) -> None:
        self._events.put(_Exited(child, process.wait()))

    def _wait_for_event(self) -> None:
        times = [child.restart_at for child in self._children if child.restart_at is not None]
        times += [self._kill_at] if self._kill_at is not None else []
        waits = [max(0.0, min(times) - self._clock())] if times else []
        waits += [self._look_s] if self._look_s is not None else []
        try:
            event = self._events.get(timeout=min(waits) if waits else None)
        except Empty:
            return
        match event:
            case _Signalled():
                self._forward()
            case _Exited(child, code):
                self._bury(child, code)

    def _listen(self) -> None:
        """Count the silence of each child, and end the one that was silent for too long.

        Only the time in which we ran ourselves counts: a machine that slept, or a supervisor that was stopped, says
        nothing about its children.
        """
        if self._hang_limit_s is None or self._look_s is None:
            return
        now = self._clock()
        passed_s, self._looked_at = min(now - self._looked_at, 2 * self._look_s), now
        for child in self._children:
            if child.process is None or child.line is None or child.killed:
                continue
            said = child.line.hear()
            self._any_was_ready |= READY in said
            child.heard |= bool(said)
            child.silent_s = 0.0 if said else child.silent_s + passed_s
            if child.silent_s > (self._hang_limit_s if child.heard else max(self._start_s, self._hang_limit_s)):
                log.error("%d gave no sign of life for %.0f s: killing it", child.process.pid, child.silent_s)
                child.killed = True
                child.process.kill()

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
        if child.line is not None:
            self._any_was_ready |= READY in child.line.hear()
            child.line.close()
            child.line = None
        if self._stopping or code == DONE:
            return
        if code == WRONG_SETTINGS:
            log.error("%d ended with wrong settings and is not started again", pid)
            self._result = WRONG_SETTINGS
        elif self._never_began(code):
            self._result = code
            for other in self._children:
                other.restart_at = None
        else:
            self._start_later(child, f"{pid} ended with {HUNG if child.killed else code}")

    def _never_began(self, code: int) -> bool:
        """Whether the start itself failed, told in a sentence by the child: a restart would only say it again.

        A child that a signal ended told nobody anything and is tried again.
        """
        running = any(child.process is not None for child in self._children)
        return self._hang_limit_s is not None and code > 0 and not self._any_was_ready and not running

    def _start_later(self, child: _Child, why: str) -> None:
        now = self._clock()
        child.wait_s = self._back_off.after(child.wait_s, now - child.started_at)
        child.restart_at = now + child.wait_s
        log.warning("%s; starting it again in %.1f s", why, child.wait_s)
