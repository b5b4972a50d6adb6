"""Nights of jobs for the benchmarks, and engines driven through them: by this machine's clock, or by a modelled one.

By a modelled clock the engine's own packer decides who steps with whom, nothing is drawn, and a U-Net call lasts what a
curve says. So figures of it are of the batching alone, and as true as the curve.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

import numpy as np

from sd_engine import Cancelled, Engine, Finished, Model, Request
from sd_engine.packer import Packer
from sd_engine.row import Row
from tests.faults.fake_runner import FakeModel

SAMPLERS: Final = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras")
STEPS: Final = tuple(range(10, 51, 5))
GUIDANCE: Final = tuple(range(1, 13))  # 1 is unguided
STRENGTHS: Final = (0.3, 0.45, 0.6, 0.75, 0.9)
IMG2IMG_SHARE: Final = 0.3
PROMPTS: Final = ("a red star on a white background", "a blue circle on a yellow background", "a small green heart")
CELLS_512: Final = 64 * 64

# Height and width in pixels: of Stable Diffusion 1.5 (small, usual and portrait), and of the shipped model.
SIZES: Final = ((384, 384), (512, 512), (768, 512))
MINI_SIZES: Final = ((64, 64), (96, 96), (128, 96))


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A request, and when it comes: seconds since the night began."""

    at_s: float
    request: Request
    urgent: bool = False


def night(rng: random.Random, count: int, sizes: Sequence[tuple[int, int]]) -> list[Request]:
    """So many different requests; what people ask for is a round number, so equal jobs do occur."""
    return [_request(rng, rng.choice(sizes)) for _ in range(count)]


def _request(rng: random.Random, size: tuple[int, int]) -> Request:
    picture: dict[str, Any] = {}
    if rng.random() < IMG2IMG_SHARE:
        pixels = np.frombuffer(rng.randbytes(64 * 64 * 3), np.uint8).reshape(64, 64, 3)
        picture = {"init_image": pixels, "strength": rng.choice(STRENGTHS)}
    return Request(
        rng.choice(PROMPTS),
        seed=rng.randrange(2**32),
        steps=rng.choice(STEPS),
        guidance=float(rng.choice(GUIDANCE)),
        sampler=rng.choice(SAMPLERS),
        height=size[0],
        width=size[1],
        **picture,
    )


def work(requests: Iterable[Request]) -> float:
    """Units stepped to draw them all: U-Net rows x latent cells x steps."""
    return sum(
        (2 if request.guided else 1) * (request.height or 0) * (request.width or 0) / 64
        * request.steps * (request.strength if request.init_image is not None else 1.0)
        for request in requests
    )  # fmt: skip


def staggered(rng: random.Random, requests: Iterable[Request], window_s: float) -> list[Job]:
    """The requests as jobs that come at random moments within the window, in this order."""
    requests = list(requests)
    moments = sorted(rng.uniform(0.0, window_s) for _ in requests)
    return [Job(at_s, request) for at_s, request in zip(moments, requests, strict=True)]


# Clocks


class Clock(Protocol):
    """Seconds, and a way past the time in which nothing happens."""

    def now(self) -> float: ...
    def skip_to(self, at_s: float) -> None: ...


class WallClock:
    """This machine's; the time in which an engine would be idle is skipped, not slept."""

    def __init__(self) -> None:
        self._began, self._skipped = time.perf_counter(), 0.0

    def now(self) -> float:
        return time.perf_counter() - self._began + self._skipped

    def skip_to(self, at_s: float) -> None:
        self._skipped += max(0.0, at_s - self.now())


class ModelClock:
    """One that moves when it is told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def skip_to(self, at_s: float) -> None:
        self._now = max(self._now, at_s)

    def spend(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True, slots=True)
class Curve:
    """What the device takes, in seconds: a U-Net call, and for each picture its way through encoder and decoder.

    The rows' part grows with the latent area; that of attention, which grows faster, is left out.
    """

    call_s: float
    row_s: float  # of one U-Net row of 64 x 64 latents
    prepare_s: float = 0.0
    decode_s: float = 0.0  # of a picture of 64 x 64 latents

    @classmethod
    def of(cls, args: argparse.Namespace) -> Curve:
        """What `add_curve` asked for."""
        return cls(args.call_ms / 1e3, args.row_ms / 1e3, args.prepare_ms / 1e3, args.decode_ms / 1e3)

    def step(self, rows: Sequence[Row]) -> float:
        """Seconds of the U-Net call for these rows."""
        return self.call_s + self.row_s * sum(row.units for row in rows) / CELLS_512

    def decode(self, row: Row) -> float:
        return self.decode_s * row.lane.cells / CELLS_512


def add_curve(parser: argparse.ArgumentParser) -> None:
    """The arguments of a modelled device; their defaults are those of no device in particular."""
    parser.add_argument("--call-ms", type=float, default=12.0, help="of the model: each U-Net call")
    parser.add_argument("--row-ms", type=float, default=3.0, help="of the model: each U-Net row of 64 x 64 latents")
    parser.add_argument("--prepare-ms", type=float, default=5.0, help="of the model: prompt, noise or init image")
    parser.add_argument("--decode-ms", type=float, default=25.0, help="of the model: each picture of 512 x 512")


class CurveRunner:
    """A runner that draws nothing and takes the time that a curve says."""

    def __init__(self, clock: ModelClock, curve: Curve) -> None:
        self._clock, self._curve = clock, curve

    def prepare(self, rows: Sequence[Row]) -> None:
        """As `Runner.prepare`."""
        self._clock.spend(self._curve.prepare_s * len(rows))

    def denoise(self, rows: Sequence[Row], too_large: Callable[[Sequence[Row]], None]) -> None:
        """As `Runner.denoise`."""
        if rows:
            self._clock.spend(self._curve.step(rows))
        for row in rows:
            row.step += 1

    def decode(self, rows: Sequence[Row]) -> list[Finished]:
        """As `Runner.decode`, without pictures."""
        finished = []
        for row in rows:
            self._clock.spend(self._curve.decode(row) if row.done else 0.0)
            finished.append(Finished(row.id, row.request, None, Cancelled("x") if row.cancelled else row.error))
        return finished


def modelled_engine(clock: ModelClock, curve: Curve, max_units: int) -> Engine:
    """The real engine and packer around a `CurveRunner`."""
    models: Mapping[str, Model] = {"modelled": cast(Model, FakeModel("modelled"))}
    return Engine(models, max_units=max_units, make_runner=lambda *_: CurveRunner(clock, curve))


# Driving


@dataclass(slots=True)
class Fill:
    """Of each pack: its units, the limit's, and whether more rows of its lane waited."""

    packs: list[tuple[int, int, bool]] = field(default_factory=list)

    def share(self, *, while_work_waits: bool) -> float:
        """Units whose step brings a picture on over the limit's, of the packs beside which work waited, or of all."""
        counted = [(units, limit) for units, limit, waits in self.packs if waits or not while_work_waits]
        return sum(units for units, _ in counted) / max(1, sum(limit for _, limit in counted))


class MeteredPacker(Packer):
    """The engine's own packer, with a note of each pack."""

    def __init__(self, max_units: int, **options: Any) -> None:
        super().__init__(max_units, **options)
        self.fill = Fill()

    def pack(self) -> list[Row]:
        """As `Packer.pack`."""
        packed = super().pack()
        if packed:
            lane = packed[0].lane
            waits = any(queues.waiting for (of, _), queues in self._lanes.items() if of == lane)
            self.fill.packs.append((sum(row.units for row in packed if self.draws(row)), self.limit(lane), waits))
        return packed

    def draws(self, row: Row) -> bool:
        """Whether the row's step brings its picture on: what only fills a place does not count as filled."""
        return True


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a night went. latencies: seconds from each job's arrival to its picture, in the order of arrival."""

    seconds: float
    latencies: tuple[float, ...]
    fill: Fill

    @property
    def images_per_s(self) -> float:
        return len(self.latencies) / self.seconds

    def figures(self) -> dict[str, float]:
        """What the tables and the JSON show; `steps` are U-Net calls."""
        return {
            "images_per_s": self.images_per_s,
            "seconds": self.seconds,
            "latency_median_s": statistics.median(self.latencies),
            "latency_p95_s": p95(self.latencies),
            "fill_while_work_waits": self.fill.share(while_work_waits=True),
            "fill": self.fill.share(while_work_waits=False),
            "steps": float(len(self.fill.packs)),
        }


def p95(values: Sequence[float]) -> float:
    """The value that 95 in 100 do not exceed."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


def drive(engine: Engine, packer: Packer, jobs: Sequence[Job], clock: Clock) -> Outcome:
    """Give the engine each job when it comes, until all are drawn. packer: put in the place of the engine's own.

    Raises what a row failed with.
    """
    engine.packer = packer
    fill = packer.fill if isinstance(packer, MeteredPacker) else Fill()
    coming, came = deque(enumerate(jobs)), dict[int, int]()
    latencies = [0.0] * len(jobs)
    began = clock.now()
    while coming or not engine.idle:
        if engine.idle:
            clock.skip_to(began + coming[0][1].at_s)
        while coming and began + coming[0][1].at_s <= clock.now():
            place, job = coming.popleft()
            came[engine.add(job.request, urgent=job.urgent)] = place
        for finished in engine.step():
            if finished.error is not None:
                raise finished.error
            place = came.pop(finished.id)
            latencies[place] = clock.now() - began - jobs[place].at_s
    return Outcome(clock.now() - began, tuple(latencies), fill)
