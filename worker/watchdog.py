"""Ends the process when a step of the engine hangs: nothing else can free a thread that is stuck in a kernel.

It needs the interpreter; a process that holds its lock for ever is the supervisor's to end (``worker.lifeline``).
"""

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable

from jobs.store import Store
from worker.engine_thread import EngineThread
from worker.exit_codes import HUNG
from worker.leases import Leases
from worker.periodic import Periodic

log = logging.getLogger(__name__)

#: Seconds that one step may take, its decoding included. On a CPU the largest packs of the largest models take minutes.
STEP_LIMIT_S, STEP_LIMIT_CPU_S = 300.0, 1800.0
#: Seconds for handing the jobs back before the process ends without having done so.
PATIENCE_S = 2.0


def step_limit_for(device: str) -> float:
    """The limit where the user named none."""
    return STEP_LIMIT_CPU_S if device.startswith("cpu") else STEP_LIMIT_S


class Watchdog(Periodic):
    """``give_back`` hands the jobs back to the queue; it is given ``PATIENCE_S`` for that."""

    def __init__(
        self,
        engine: EngineThread,
        limit_s: float,
        give_back: Callable[[], None],
        *,
        exit: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__("watchdog")
        self._engine, self._limit_s, self._give_back, self._exit = engine, limit_s, give_back, exit
        self._told = False

    def step_moves(self) -> bool:
        """False for a step that lasts longer than its limit: its jobs are nobody's work any more."""
        return self._engine.stuck_s() <= self._limit_s

    def tick(self) -> float:
        stuck_s = self._engine.stuck_s()
        if stuck_s > self._limit_s:
            self._leave(stuck_s)
        elif stuck_s > self._limit_s / 2 and not self._told:
            self._told = True
            log.warning(
                "a step has taken %.0f s of the %.0f s after which it counts as hung; if steps are slow here, raise "
                "--step-limit-seconds",
                stuck_s,
                self._limit_s,
            )
        return min(1.0, self._limit_s / 10)

    def _leave(self, stuck_s: float) -> None:
        log.critical(
            "a step of the engine has not returned for %.0f s; the process leaves. It hangs here:\n%s",
            stuck_s,
            stack_of(self._engine),
        )
        # A database that hangs as well must not hold us: the leases, no longer extended, expire in any case.
        giving = threading.Thread(target=self._try_to_give_back, daemon=True)
        giving.start()
        giving.join(PATIENCE_S)
        self._exit(HUNG)

    def _try_to_give_back(self) -> None:
        try:
            self._give_back()
        except Exception as error:
            log.warning("not given back, the leases will expire: %s", error)


def give_back(store: Store, leases: Leases) -> None:
    """Release every held job; those in the engine are suspects, for any of them may be what it hangs on.

    A suspect that was alone there stays: its lease expires, and so its claim counts as one that ended the process.
    """
    held = leases.held().values()
    in_engine = [lease.claim for lease in held if not lease.drawn and not lease.claim.suspect]
    store.release_all(in_engine, suspect=True, reason="a step of the engine hung")
    store.release_all([lease.claim for lease in held if lease.drawn])


def stack_of(thread: threading.Thread) -> str:
    """Where ``thread`` is now, line by line."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame else "(it runs no Python)"
