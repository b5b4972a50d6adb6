"""Small real classes that stand in for heavy parts, with the same surface and the same promises."""

import hashlib
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sd_engine import Cancelled, Finished, InvalidRequest, Request, SavedRowUnusable
from worker.engine_thread import Workshop

SIDE = 64


def fake_image(request: Request) -> NDArray[np.uint8]:
    """uint8 ``[H, W, 3]`` of one colour that depends on prompt and seed alone."""
    digest = hashlib.sha256(f"{request.prompt}|{request.seed}".encode()).digest()
    return np.full((request.height or SIDE, request.width or SIDE, 3), list(digest[:3]), dtype=np.uint8)


@dataclass(slots=True)
class _Row:
    request: Request
    done: int = 0
    cancelled: bool = False


class FakeEngine:
    """``sd_engine.Engine`` without a model: all rows move one step each time, pictures depend on prompt and seed.

    ``before_step`` is called at the start of each step, with the engine: tests hold a step there or raise in it.
    A prompt that contains "broken row" fails alone.
    """

    def __init__(
        self,
        models: tuple[str, ...] = ("nightshift-mini",),
        *,
        before_step: Callable[["FakeEngine"], None] = lambda engine: None,
        step_s: float = 0.0,
    ) -> None:
        self.models = models
        self.before_step = before_step
        self.steps = 0
        self.urgent: list[Request] = []  # all that ever were
        self._step_s = step_s
        self._ids = itertools.count(1)
        self._rows: dict[int, _Row] = {}

    @property
    def idle(self) -> bool:
        return not self._rows

    def add(self, request: Request, saved: bytes | None = None, *, urgent: bool = False) -> int:
        if request.model is not None and request.model not in self.models:
            raise InvalidRequest("model", request.model, "one of " + ", ".join(self.models))
        id = next(self._ids)
        self._rows[id] = _Row(request, _steps_of(request, saved) if saved else 0)
        if urgent:
            self.urgent.append(request)
        return id

    def save(self, id: int) -> bytes:
        row = self._rows[id]
        return f"{row.done} {row.request.prompt} {row.request.seed}".encode() if row.done else b""

    def cancel(self, id: int) -> None:
        if id in self._rows:
            self._rows[id].cancelled = True

    def progress(self, id: int) -> tuple[int, int]:
        row = self._rows[id]
        return row.done, row.request.steps

    def step(self) -> list[Finished]:
        self.before_step(self)
        self.steps += 1
        time.sleep(self._step_s)
        return [finished for id in list(self._rows) if (finished := self._move(id)) is not None]

    def _move(self, id: int) -> Finished | None:
        row = self._rows[id]
        row.done += 1
        error: Exception | None = None
        if row.cancelled:
            error = Cancelled(f"row {id}")
        elif "broken row" in row.request.prompt:
            error = ArithmeticError("not finite")
        elif row.done < row.request.steps:
            return None
        del self._rows[id]
        return Finished(id, row.request, None if error else fake_image(row.request), error)


def _steps_of(request: Request, saved: bytes) -> int:
    done, _, of = saved.decode("utf-8", "replace").partition(" ")
    if of != f"{request.prompt} {request.seed}" or not done.isdecimal():
        raise SavedRowUnusable("it is of another request")
    return int(done)


def fake_workshop(
    *,
    before_step: Callable[[FakeEngine], None] = lambda engine: None,
    step_s: float = 0.0,
    models: tuple[str, ...] = ("nightshift-mini",),
    broken: dict[str, str] | None = None,
) -> Workshop:
    """A workshop whose engines are fakes."""
    return Workshop(
        make_engine=lambda: FakeEngine(models, before_step=before_step, step_s=step_s),
        device="fake",
        models=(*models, *(broken or {})),
        broken=broken or {},
    )
