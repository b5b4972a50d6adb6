"""A runner that moves rows without a model: the engine's own packer, rows and loop, with a step of milliseconds.

Pictures depend on every draw of their row, in its order, so a swapped or badly resumed row shows. What a prompt
begins with makes its row misbehave: see `MISDEEDS`. Each picture leaves a line in the tally, kept outside the
application: what was computed, whatever the database believes.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from jobs.failpoints import ACTIONS
from sd_engine import Cancelled, Engine, Finished, Model, Request
from sd_engine.halving import halving
from sd_engine.noise import noise_source
from sd_engine.row import Lane, Row
from sd_engine.runner import Runner
from sd_engine.samplers import SLOTS
from sd_engine.schedules import NoiseSchedule
from worker.engine_thread import Workshop

MODEL = "nightshift-mini"
SIDE = 64
CHANNELS, FACTOR = 4, 8


class Misdeed(RuntimeError):
    """What the prompts "raises" and "breaks" raise."""


def _abort() -> None:
    with suppress(ValueError, OSError):
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def _raise() -> None:
    raise Misdeed("a prompt asked for it")


def _hang() -> None:
    while True:
        time.sleep(3600)


def _eat_memory() -> None:
    """Until somebody ends the process for it; never more than 8 GB."""
    eaten = []
    for _ in range(128):
        eaten.append(bytearray(b"x" * 2**26))
        time.sleep(0.02)
    raise AssertionError(f"nobody minded {len(eaten)} x 64 MiB")


def _ask_for_memory() -> None:
    """Until it is refused; none of it is touched, so none of it is really taken."""
    asked = [bytearray(2**28) for _ in range(256)]
    raise AssertionError(f"no limit of memory was set: {len(asked)} x 256 MiB were granted")


#: By the first word of a prompt. `breaks` and those that end the process do it at the row's second step, beside the
#: others of its pack; `raises` fails as a bad row does, through the runner's own halving.
MISDEEDS: Mapping[str, Callable[[], object]] = MappingProxyType(
    {
        "poison": _abort,
        "raises": _raise,
        "breaks": _raise,
        "hangs": _hang,
        "spins": lambda: ACTIONS["spin"](0.0),
        "eats": _eat_memory,
        "asks": _ask_for_memory,
    }
)
_WHOLE_STEP = frozenset(MISDEEDS) - {"raises"}


@dataclass(frozen=True, slots=True)
class Tally:
    """An append-only file of what was computed; a line is written by one call, so writers never mix."""

    path: Path | None

    def add(self, what: str, row: Row) -> None:
        """`drawn` for a picture, `began` and `resumed` for a row that the engine took in."""
        if self.path is None:
            return
        now = f"{time.monotonic():.4f}"
        line = "\t".join([what, row.request.prompt, str(row.request.seed), str(os.getpid()), now, str(row.step)])
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{line}\n".encode())
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the tally. `at_s`: on the machine's monotonic clock, the same for all processes."""

    what: str
    prompt: str
    seed: int
    pid: int
    at_s: float
    step: int


def read_tally(path: Path) -> list[Entry]:
    """All lines so far, in the order written."""
    if not path.exists():
        return []
    lines = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    return [
        Entry(what, prompt, int(seed), int(pid), float(at), int(step)) for what, prompt, seed, pid, at, step in lines
    ]


@dataclass(frozen=True, slots=True)
class FakeModel:
    """What engine and runner ask of a model that has no weights."""

    name: str = MODEL
    size: tuple[int, int] = (SIDE, SIDE)
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    inpainting: bool = False
    latent_channels: int = CHANNELS
    factor: int = FACTOR
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    fingerprint: str = "fake"


class FakeRunner:
    """`sd_engine.runner.Runner` without tensors of any size. step_s: of one pack, whatever is in it. oom_rows: packs of
    more rows than that find no memory; 0: all do."""

    def __init__(self, *, tally: Tally, step_s: float = 0.002, oom_rows: int = 0) -> None:
        self._tally, self._step_s, self._oom_rows = tally, step_s, oom_rows

    def prepare(self, rows: Sequence[Row]) -> None:
        """As `Runner.prepare`; the engine puts a row that was saved back where it was afterwards."""
        for row in rows:
            self._tally.add("began" if row.resume is None else "resumed", row)
            row.noise = row.noise or noise_source(row.request.noise, row.request.seed)
            if row.state is None:
                row.state = torch.zeros(SLOTS, CHANNELS, row.lane.height // FACTOR, row.lane.width // FACTOR)
                row.state[0] = row.noise.draw(tuple(row.state[0].shape))

    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None:
        """As `Runner.denoise`; a misdeed happens here."""
        _misbehave(rows, _WHOLE_STEP)
        halving(self._denoise, rows, too_large)

    def decode(self, rows: Sequence[Row]) -> list[Finished]:
        """As `Runner.decode`."""
        return [self._finished(row) for row in rows]

    def _denoise(self, rows: Sequence[Row]) -> None:
        if self._oom_rows and len(rows) > self._oom_rows:
            raise torch.OutOfMemoryError("the fake device is full")
        _misbehave(rows, {"raises"})
        time.sleep(self._step_s)
        for row in rows:
            _move(row)

    def _finished(self, row: Row) -> Finished:
        if row.cancelled or row.error is not None or not row.done:
            return Finished(row.id, row.request, None, Cancelled(f"row {row.id}") if row.cancelled else row.error)
        self._tally.add("drawn", row)
        return Finished(row.id, row.request, _picture(row))


def _misbehave(rows: Iterable[Row], words: Iterable[str]) -> None:
    for row in rows:
        word = row.request.prompt.split(" ", 1)[0]
        if word in words and row.step >= 1:
            MISDEEDS[word]()


def _move(row: Row) -> None:
    assert row.state is not None and row.noise is not None, "a row is prepared before it is stepped"
    drawn_CHW = row.noise.draw(tuple(row.state[0].shape))
    state_SCHW = row.state.clone()
    state_SCHW[0] = 0.75 * row.state[0] + 0.25 * drawn_CHW + 0.01 * row.step
    row.state = state_SCHW
    row.step += 1


def _picture(row: Row) -> npt.NDArray[np.uint8]:
    """A few colours that depend on the prompt, the seed and every number of the row's state."""
    assert row.state is not None, "a row that is done has a state"
    numbers = row.state[0].numpy().tobytes()
    digest = hashlib.sha512(f"{row.request.prompt}|{row.request.seed}|".encode() + numbers).digest()
    colours = np.frombuffer(digest[:48], dtype=np.uint8).reshape(4, 4, 3)
    return np.kron(colours, np.ones((row.lane.height // 4, row.lane.width // 4, 1), dtype=np.uint8))


def fake_engine(*, tally: Tally, step_s: float = 0.002, oom_rows: int = 0, models: Sequence[str] = (MODEL,)) -> Engine:
    """The real engine around a fake runner."""
    named = {name: cast(Model, FakeModel(name)) for name in models}

    def make(_models: Mapping[str, Model], _bucket: Callable[[Lane], int], _bytes: int, _limit: int) -> Runner:
        return cast(Runner, FakeRunner(tally=tally, step_s=step_s, oom_rows=oom_rows))

    return Engine(named, make_runner=make)


def fake_workshop(
    *, tally: Path, step_s: float = 0.002, oom_rows: int = 0, models: Sequence[str] = (MODEL,)
) -> Workshop:
    """What a worker opens in place of models and a device."""
    torch.set_num_threads(1)
    return Workshop(
        make_engine=lambda: fake_engine(tally=Tally(tally), step_s=step_s, oom_rows=oom_rows, models=models),
        device="fake",
        models=tuple(models),
    )


@cache
def _quick_engine() -> Engine:
    return fake_engine(tally=Tally(None), step_s=0.0)


def expected_pictures(requests: Sequence[Request]) -> Sequence[npt.NDArray[np.uint8]]:
    """What an undisturbed engine draws for these requests. Each depends on its own request alone: see `_move`."""
    return _quick_engine().render(requests)
