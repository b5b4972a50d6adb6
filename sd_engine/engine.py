"""The engine: requests go in, pictures come out, and in between rows are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sd_engine.devices import default_max_units
from sd_engine.errors import InvalidRequest
from sd_engine.latents import DECODE_BATCH
from sd_engine.model import Model
from sd_engine.packer import Packer
from sd_engine.passes import first_row, second_row
from sd_engine.preview import Previewer
from sd_engine.prompts import DEFAULT_CACHE_BYTES
from sd_engine.request import Finished, Request
from sd_engine.row import Lane, Row
from sd_engine.runner import Runner
from sd_engine.saved import Saver, resume

# Four guided pictures: enough to be worth sharing, few enough that one alone does not wait for long.
DETERMINISTIC_UNET_ROWS = 8


class RunnerLike(Protocol):
    """What the engine needs of a `Runner`; a row that it cannot prepare, step or decode gets its `error`."""

    def prepare(self, rows: Sequence[Row]) -> None: ...
    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None: ...
    def decode(self, rows: Sequence[Row]) -> list[Finished]: ...


MakeRunner = Callable[[Mapping[str, Model], Callable[[Lane], int], int, int], RunnerLike]
"""(models, U-Net rows that a lane is padded to, bytes of prompts kept, most pictures decoded at once) -> its runner."""


class Engine:
    """Draws requests with the given models, many in one U-Net call. Not thread-safe: one thread owns it.

    models: one model, or several by name (a request without a name takes the first).
    max_units: the limit of one pack, in U-Net rows x latent cells; None: what suits the first model's device.
    deterministic: pad every pack to the same number of U-Net rows, step it with one CPU thread, and decode one picture
    at a time, so that on a CPU the bits of a picture do not depend on its neighbours. It costs the U-Net rows that
    nobody uses and the threads that do not help.
    cache_bytes: how much of each model's encoded prompts is kept on its device for those who come with the same.
    make_runner: what makes all tensor operations; another than `Runner` draws other pictures, by the same bookkeeping.
    """

    def __init__(
        self,
        models: Model | Mapping[str, Model],
        *,
        max_units: int | None = None,
        deterministic: bool = False,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        make_runner: MakeRunner = Runner,
    ) -> None:
        named = {models.name: models} if isinstance(models, Model) else dict(models)
        if not named:
            raise ValueError("models is empty: an engine needs at least one")
        self.models = named
        if max_units is None:
            max_units = default_max_units(next(iter(named.values())).device, padded=deterministic)
        self.packer = Packer(
            max_units,
            max_unet_rows=DETERMINISTIC_UNET_ROWS if deterministic else None,
        )
        decode_limit = 1 if deterministic else DECODE_BATCH
        self.saver = Saver(named)
        self.previewer = Previewer(named)
        self.runner = make_runner(named, self.packer.bucket, cache_bytes, decode_limit)
        self._ids = count(1)
        self._rows: dict[int, Row] = {}

    def step(self) -> list[Finished]:
        """Take in what waits, step one pack, and return what has ended (pictures, failures, cancellations)."""
        self._prepare(self.packer.admit())
        self.runner.denoise(self.packer.pack(), self.packer.too_large)
        return self._leave(self.runner.decode(self._ended(self.packer.retire())))

    def add(self, request: Request, saved: bytes | None = None, *, urgent: bool = False) -> int:
        """Take a request in and return its id. Raises InvalidRequest, and then nothing was added.

        urgent: somebody waits for it. It is taken in at once and goes first, in packs with none but its like; the
        others keep what they have, and go on meanwhile only as far as `Packer` promises them.
        saved: what `save` gave of this request, here or elsewhere: it goes on exactly there. Raises SavedRowUnusable
        for bytes that are damaged, or of another request, model, step table or version.
        """
        if not isinstance(request, Request):
            raise InvalidRequest("request", type(request).__name__, "an sd_engine.Request", "Request(prompt)")
        model_name = request.model if request.model is not None else next(iter(self.models))
        if model_name not in self.models:
            raise InvalidRequest("model", model_name, "one of " + ", ".join(self.models))
        row = first_row(next(self._ids), request, model_name, self.models[model_name], urgent=urgent)
        row = self.saver.load(row, saved or b"")
        self.packer.add(row)
        self._rows[row.id] = row
        return row.id

    def save(self, id: int) -> bytes:
        """A request in flight as it stands, for `add`; empty where it has not begun: it then starts anew.

        Raises KeyError for an id that is not in flight.
        """
        return self.saver.save(self._rows[id])

    def cancel(self, id: int) -> None:
        """Let a request leave at the next step, as Finished with error Cancelled; one that has ended is left alone."""
        self.packer.cancel(id)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is in flight; on each such look the packer's books are checked."""
        if self.packer.idle:
            self.packer.check()
        return self.packer.idle

    def preview(self, id: int) -> npt.NDArray[np.uint8] | None:
        """A rough picture of a request in flight, uint8 [h, w, 3], a pixel for each latent cell; None before a step.

        Raises KeyError for an id that is not in flight.
        """
        return self.previewer.preview(self._rows[id])

    def progress(self, id: int) -> tuple[int, int]:
        """Steps made and steps in all. Raises KeyError for an id that is not in flight."""
        return self._rows[id].progress

    def render(self, requests: Iterable[Request]) -> list[npt.NDArray[np.uint8]]:
        """Draw all, in order: uint8 [H, W, 3] each.

        Raises InvalidRequest for the first request that is not allowed, and the first error that a row ended with;
        either way nothing of this call stays in the engine. Raises RuntimeError while others' requests are in flight:
        their endings would be lost here.
        """
        if not self.packer.idle:
            raise RuntimeError("render() needs an idle engine: drive the requests in flight to their end by step()")
        pictures: dict[int, npt.NDArray[np.uint8]] = {}
        try:
            ids = [self.add(request) for request in requests]
            while not self.packer.idle:
                pictures |= {finished.id: _picture(finished) for finished in self.step()}
        except BaseException:
            self._abandon()
            raise
        return [pictures[id] for id in ids]

    def _abandon(self) -> None:
        for id in list(self._rows):
            self.packer.cancel(id)
        self.packer.retire()
        self._rows.clear()

    def _prepare(self, rows: list[Row]) -> None:
        self.runner.prepare(rows)
        for row in rows:
            if row.error is None:
                resume(row)

    def _ended(self, retired: list[Row]) -> list[Row]:
        """Those that are through; the others go on with their second pass, as rows of a larger lane."""
        ended = []
        for row in retired:
            second = second_row(row)
            if second is None:
                ended.append(row)
            else:
                self.packer.add(second)
                self._rows[row.id] = second
        return ended

    def _leave(self, finished: list[Finished]) -> list[Finished]:
        for done in finished:
            del self._rows[done.id]
        return finished


def _picture(finished: Finished) -> npt.NDArray[np.uint8]:
    if finished.error is not None:
        raise finished.error
    assert finished.image is not None, "a request that ended without an error has a picture"
    return finished.image
