"""The one thread of a process that owns torch and the engine; everybody else talks to it by commands and futures."""

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Protocol
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from jobs.failpoints import failpoint
from sd_engine import Finished, Request, SavedRowUnusable
from sd_engine.errors import DeviceLost
from worker.exit_codes import BROKEN
from worker.reasons import Draining, StepBroke
from worker.saved_group import SavedGroup, seal_group, unseal_group

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
"""One image: uint8 ``[H, W, 3]``."""


class EngineLike(Protocol):
    """What the thread needs of ``sd_engine.Engine``."""

    @property
    def idle(self) -> bool: ...
    def add(self, request: Request, saved: bytes | None = None, *, urgent: bool = False) -> int: ...
    def save(self, id: int) -> bytes: ...
    def cancel(self, id: int) -> None: ...
    def step(self) -> list[Finished]: ...
    def progress(self, id: int) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Workshop:
    """What ``open_workshop`` makes inside the engine's thread.

    ``make_engine`` is called again after a step raised, so that no half-stepped rows survive; the models stay loaded.
    ``broken``: those of ``models`` that could not be loaded, each with its reason.
    ``guard``: entered once around all steps.
    """

    make_engine: Callable[[], EngineLike]
    device: str
    models: tuple[str, ...]
    broken: Mapping[str, str] = field(default_factory=dict)
    guard: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(slots=True)
class _Group:
    """The rows of one claim: engine id -> place in the answer, and -> the steps that it came with."""

    requests: Sequence[Request]
    future: Future[list[Pixels]]
    added_at: float
    urgent: bool
    places: dict[int, int] = field(default_factory=dict)
    came_with: dict[int, int] = field(default_factory=dict)
    images: dict[int, Pixels] = field(default_factory=dict)


class EngineThread(threading.Thread):
    """Runs the engine's steps while it has rows and sleeps on its command queue otherwise.

    ``open_workshop`` runs in this thread (torch settings are per thread, a CUDA context belongs to it).
    """

    def __init__(
        self,
        open_workshop: Callable[[], Workshop],
        *,
        clock: Callable[[], float] = time.monotonic,
        exit: Callable[[int], None] = os._exit,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self.ready: Future[Workshop] = Future()
        self._open_workshop = open_workshop
        self._clock = clock
        self._exit = exit
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._groups: dict[UUID, _Group] = {}
        self._owner: dict[int, UUID] = {}
        self._deadline: float | None = None
        self._step_s = 0.0
        self._step_began: float | None = None
        self._closed = False

    # Called from any thread

    def render(
        self, key: UUID, requests: Sequence[Request], saved: bytes | None = None, *, urgent: bool = False
    ) -> Future[list[Pixels]]:
        """One image (uint8 ``[H, W, 3]``) per request, in order. ``urgent``: they go before the others.

        ``saved``: from the ``Draining`` of the same requests, here or elsewhere: they go on exactly there. What cannot
        be used of it is drawn from the start.
        The future raises the first error of a row (its sister rows leave too), ``InvalidRequest`` when the engine
        refuses a request, the reason given to ``interrupt``, ``Draining`` with the rows as they stand, and what a step
        raised as a whole: ``StepBroke`` when others were in flight, the error itself when they were alone.
        """
        future: Future[list[Pixels]] = Future()
        self._commands.put(partial(self._add, key, _Group(requests, future, self._clock(), urgent), saved))
        return future

    def interrupt(self, key: UUID, reason: Exception) -> None:
        """The rows of ``key`` leave at the next step, and its future raises ``reason``. Unknown keys are ignored."""
        self._commands.put(partial(self._fail, key, reason))

    def drain(self, deadline: float) -> None:
        """Admit nothing more; drop at once what cannot be done by ``deadline`` (on ``clock``), the rest then."""
        self._commands.put(partial(setattr, self, "_deadline", deadline))

    def close(self) -> None:
        """End the thread; whatever is in flight raises ``Draining``. Call ``join`` to wait for it."""
        self._commands.put(self._close)

    def stuck_s(self) -> float:
        """Seconds that the step in progress has lasted, on ``clock``; 0.0 while none runs, and while models load."""
        began = self._step_began  # read once: the thread may end its step meanwhile
        return 0.0 if began is None else self._clock() - began

    # Only in the thread itself

    def run(self) -> None:
        try:
            self._workshop = self._open_workshop()
            self._engine = self._workshop.make_engine()
        except BaseException as error:
            self.ready.set_exception(error)
            return
        self.ready.set_result(self._workshop)
        try:
            with self._workshop.guard():
                while not self._closed:
                    self._turn_or_start_anew()
        except BaseException:
            # A lost device comes here too: nobody knows by whose row, so all are left to their leases.
            # Without this thread every task would wait for ever while the heartbeat keeps its lease alive.
            log.critical("the engine thread died; the process leaves", exc_info=True)
            self._exit(BROKEN)

    def _turn_or_start_anew(self) -> None:
        try:
            self._turn()
        except DeviceLost:
            raise
        except Exception as error:
            self._start_anew(error)

    def _turn(self) -> None:
        self._obey(wait=self._engine.idle)
        if self._deadline is not None:
            self._drop_late_groups(self._deadline)
        if self._engine.idle or self._closed:
            return
        finished = self._timed_step()
        for row in finished:
            self._settle(row)

    def _timed_step(self) -> list[Finished]:
        began = self._step_began = self._clock()
        try:
            failpoint("step")
            return self._engine.step()
        finally:
            self._step_began = None
            lasted = self._clock() - began
            self._step_s = 0.8 * (self._step_s or lasted) + 0.2 * lasted

    def _obey(self, *, wait: bool) -> None:
        """Run every waiting command; with ``wait``, sleep until there is one."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except Empty:
            return

    def _add(self, key: UUID, group: _Group, saved: bytes | None) -> None:
        if self._deadline is not None:
            group.future.set_exception(Draining("the worker admits nothing more", saved))
            return
        group.added_at = self._clock()
        self._groups[key] = group
        try:
            kept = _unsealed(key, group.requests, saved)
            group.images.update(kept.images)
            for place, request in enumerate(group.requests):
                if place not in group.images:
                    self._add_row(key, place, request, kept.rows.get(place))
        except Exception as error:
            self._fail(key, error)
        else:
            self._end_if_whole(key, group)

    def _add_row(self, key: UUID, place: int, request: Request, saved: bytes | None) -> None:
        group = self._groups[key]
        try:
            id = self._engine.add(request, saved, urgent=group.urgent)
        except SavedRowUnusable as error:
            log.warning("claim %s, image %d: drawn from the start: %s", key, place, error)
            id = self._engine.add(request, urgent=group.urgent)
        group.places[id], group.came_with[id] = place, self._engine.progress(id)[0]
        self._owner[id] = key

    def _settle(self, row: Finished) -> None:
        key = self._owner.pop(row.id, None)
        if key is None:  # the last sign of a row whose group was failed before
            return
        group = self._groups[key]
        if row.error is not None or row.image is None:
            self._fail(key, row.error or RuntimeError(f"the engine finished row {row.id} with neither image nor error"))
            return
        group.images[group.places.pop(row.id)] = row.image
        self._end_if_whole(key, group)

    def _end_if_whole(self, key: UUID, group: _Group) -> None:
        if not group.places:
            del self._groups[key]
            group.future.set_result([group.images[place] for place in sorted(group.images)])

    def _fail(self, key: UUID, reason: Exception) -> None:
        group = self._groups.pop(key, None)
        if group is None:
            return
        for id in group.places:
            if self._owner.pop(id, None) is not None:
                self._engine.cancel(id)
        group.future.set_exception(reason)

    def _start_anew(self, error: Exception) -> None:
        """A step raised as a whole: nobody can say for which row, and the next jobs find a fresh engine."""
        log.error("engine step failed with %d jobs in flight", len(self._groups), exc_info=error)
        groups, self._groups = self._groups, {}
        self._owner.clear()
        self._engine = self._workshop.make_engine()
        for group in groups.values():
            group.future.set_exception(error if len(groups) == 1 else _step_broke(error))

    def _drop_late_groups(self, deadline: float) -> None:
        now = self._clock()
        late = [key for key, group in self._groups.items() if now + self._remaining_s(group, now) > deadline]
        for key in late:
            self._hand_back(key, "it would not be done within the grace time")

    def _hand_back(self, key: UUID, why: str) -> None:
        self._fail(key, Draining(why, self._saved(key, self._groups[key])))

    def _saved(self, key: UUID, group: _Group) -> bytes | None:
        """The group as it stands; None when nothing was made of it yet, or it cannot be had from the device."""
        if not group.images and not any(self._engine.progress(id)[0] for id in group.places):
            return None
        try:
            rows = {place: self._engine.save(id) for id, place in group.places.items()}
            return seal_group(group.requests, SavedGroup(group.images, rows))
        except Exception:
            log.warning("claim %s: not saved, whoever has it next draws it from the start", key, exc_info=True)
            return None

    def _remaining_s(self, group: _Group, now: float) -> float:
        """A guess from the row's own pace so far (lanes take turns), or from the last steps when it has not begun."""
        guesses = [0.0]
        for id in group.places:
            done, steps = self._engine.progress(id)
            here = done - group.came_with[id]
            pace = (now - group.added_at) / here if here else self._step_s
            guesses.append((steps - done) * pace)
        return max(guesses)

    def _close(self) -> None:
        for key in list(self._groups):
            self._hand_back(key, "the worker ends")
        self._deadline = self._clock()
        self._closed = True


def _unsealed(key: UUID, requests: Sequence[Request], saved: bytes | None) -> SavedGroup:
    if saved is None:
        return SavedGroup()
    try:
        return unseal_group(requests, saved)
    except SavedRowUnusable as error:
        log.warning("claim %s: drawn from the start: %s", key, error)
        return SavedGroup()


def _step_broke(error: Exception) -> StepBroke:
    """One for each future: raising it again adds to its traceback, in another thread each."""
    broke = StepBroke("a step broke that it shared with others")
    broke.__cause__ = error
    return broke
