"""How long does somebody wait for a picture while the machine is full of bulk jobs?

    python -m benchmarks.urgent                      (ten minutes on two cores)
    python -m benchmarks.urgent --quick              (seconds; says nothing about speed)
    python -m benchmarks.urgent --call-ms 20 --row-ms 2 --measured 0

A bulk run that never ends (mixed jobs; enough always wait for full packs) is joined, at random moments and one at a
time, by a job of 20 guided steps that somebody waits for. Its latency is from its arrival to its picture, against the
same job on an idle engine, in turn with it:

- ours, urgent: `Engine.add(urgent=True)`, what a worker does with a job of priority 7 to 9;
- ours, not urgent: it joins as any other row does;
- static, first of the next batch: it waits for the end of the static batch (all rows wait for the slowest), then goes
  first, alone;
- static, of equal jobs: the same where a batch is of equal jobs.

Each is done twice: measured (the shipped model on this machine, four guided pictures of 128 x 96 a pack) and modelled
(Stable Diffusion's sizes, by a clock on which a U-Net call lasts what `--call-ms` and `--row-ms` say; see
`benchmarks.mixed`). Then through whole services, from submit to stored picture, beside a worker that is full of bulk
jobs, in packs as large as by default and of sixteen pictures (`benchmarks.urgent_worker`). The goal: the 95th
percentile is at most 1.5 x the median on an idle machine. Prints tables, writes `benchmarks/results/urgent.json` and a
plot.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.goals import Goal, as_json, at_most
from benchmarks.mixed import MINI_UNITS, MODEL_UNITS
from benchmarks.nights import (
    MINI_SIZES,
    PROMPTS,
    SIZES,
    Clock,
    Curve,
    MeteredPacker,
    ModelClock,
    WallClock,
    add_curve,
    modelled_engine,
    night,
    p95,
)
from benchmarks.report import result_file, write
from benchmarks.static_batches import StaticPacker, anything, equal
from benchmarks.urgent_worker import PACKS, URGENT, through_workers
from sd_engine import Engine, Request, load_model, shipped_model
from sd_engine.packer import Packer

GOAL = 1.5
STEPS = 20
# Bulk rows kept waiting, so that no pack is short of them, of whichever lane.
BACKLOG = 48


@dataclass(frozen=True, slots=True)
class Way:
    """How bulk jobs are packed or batched, and whether the job that somebody waits for is told to be urgent.

    gap: the most time between two of those who wait, in times on an idle machine. Longer than a static batch, or they
    would all come at the beginning of one.
    """

    packer: Callable[[int], Packer]
    urgent: bool
    gap: float


PLAIN, SLOWEST, EQUAL = "ours, not urgent", "static, first of the next batch", "static, of equal jobs"
WAYS: Mapping[str, Way] = {
    URGENT: Way(MeteredPacker, True, 4.0),
    PLAIN: Way(MeteredPacker, False, 4.0),
    SLOWEST: Way(lambda units: StaticPacker(units, anything, padded=True), True, 30.0),
    EQUAL: Way(lambda units: StaticPacker(units, equal, padded=True), True, 12.0),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What is driven: how an engine is made, its clock, its limit, and the sizes of the jobs (who waits asks for the
    second)."""

    make: Callable[[], Engine]
    clock: Clock
    max_units: int
    sizes: Sequence[tuple[int, int]]

    def wanted(self, seed: int) -> Request:
        """The job that somebody waits for."""
        height, width = self.sizes[1]
        return Request(PROMPTS[0], seed=seed, steps=STEPS, guidance=7.5, height=height, width=width)


class Bulk:
    """An engine with a run of bulk jobs that never ends."""

    def __init__(self, machine: Machine, way: Way, rng: random.Random) -> None:
        self._machine, self._way, self._rng = machine, way, rng
        self._engine = machine.make()
        self._engine.packer = way.packer(machine.max_units)

    def run_for(self, steps: int) -> None:
        """Some steps of bulk jobs alone."""
        for _ in range(steps):
            self._step()

    def latency(self, request: Request, within_s: float) -> float:
        """Seconds until the picture, of a request that comes at a random moment within so many seconds from now.

        It is taken in when the step that runs at that moment has ended.
        """
        clock = self._machine.clock
        arrived = clock.now() + self._rng.uniform(0.0, within_s)
        while clock.now() < arrived:
            self._step()
        wanted = self._engine.add(request, urgent=self._way.urgent)
        while wanted not in self._step():
            pass
        return clock.now() - arrived

    def _step(self) -> list[int]:
        short = BACKLOG - len(self._engine.packer)
        for request in night(self._rng, short, self._machine.sizes):
            self._engine.add(request)
        finished = self._engine.step()
        for row in finished:
            if row.error is not None:
                raise row.error
        return [row.id for row in finished]


def idle_latency(machine: Machine, engine: Engine, request: Request) -> float:
    """Seconds of the request on an engine that does nothing else."""
    began = machine.clock.now()
    id = engine.add(request)
    while id not in [row.id for row in engine.step()]:
        pass
    return machine.clock.now() - began


def latencies(machine: Machine, seed: int, samples: Mapping[str, int]) -> dict[str, list[float]]:
    """Of each way, and `idle` in turn with them. samples: of each way; a round takes one of each that has some left."""
    rng = random.Random(seed)
    runs = {way: Bulk(machine, WAYS[way], random.Random(seed)) for way in samples}
    alone = machine.make()
    idle_latency(machine, alone, machine.wanted(0))  # warm
    for run in runs.values():
        run.run_for(rng.randrange(20, 40))
    found: dict[str, list[float]] = {"idle": [], **{way: [] for way in samples}}
    for i in range(max(samples.values())):
        request = machine.wanted(rng.randrange(2**32))
        found["idle"].append(idle_latency(machine, alone, request))
        for way, run in runs.items():
            if i < samples[way]:
                found[way].append(run.latency(request, WAYS[way].gap * found["idle"][0]))
    return found


def figures(found: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of each, and their ratios to the median on an idle machine."""
    idle = statistics.median(found["idle"])
    return {
        way: {
            "samples": len(values),
            "median_s": statistics.median(values),
            "p95_s": p95(values),
            "median_x_idle": statistics.median(values) / idle,
            "p95_x_idle": p95(values) / idle,
        }
        for way, values in found.items()
    }


def goal(found: Mapping[str, Mapping[str, float]]) -> Goal:
    """The goal of the urgent job, and what was reached."""
    return at_most(f"p95 of an urgent job <= {GOAL} x its time on an idle machine", found[URGENT]["p95_x_idle"], GOAL)


def show(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\n{title}\n{'':36}{'samples':>9}{'median, s':>12}{'p95, s':>12}{'median x idle':>16}{'p95 x idle':>13}")
    for way, line in found.items():
        print(
            f"{way:36}{line['samples']:9.0f}{line['median_s']:12.3f}{line['p95_s']:12.3f}"
            f"{line['median_x_idle']:16.2f}{line['p95_x_idle']:13.2f}"
        )
    print(f"  {goal(found).line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a handful of samples")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--measured", type=int, default=24, help="samples with the shipped model; 0: do not measure")
    parser.add_argument("--samples", type=int, default=300, help="of the modelled clock")
    parser.add_argument("--service", type=int, default=20, help="samples of each whole service; 0: do not measure them")
    add_curve(parser)
    parser.add_argument("--device", default="cpu", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/urgent.json")
    args = parser.parse_args(arguments)
    args.out = args.out or result_file("urgent.json", quick=args.quick)
    if args.quick:
        args.samples, args.measured, args.service = min(args.samples, 10), min(args.measured, 1), 0
    result: dict[str, Any] = {"seed": args.seed, "steps": STEPS, "backlog": BACKLOG, "curve": asdict(Curve.of(args))}
    bars: dict[str, float] = {}
    for name, title, seconds in parts(args):
        found = figures(seconds)
        show(title, found)
        result[name] = {"latencies": found, "goals": as_json([goal(found)])}
        bars |= {f"{way} ({name})": line["p95_x_idle"] for way, line in found.items() if way != "idle"}
        write(args.out, result, device=args.device)  # after each: a later one may find no server
        plots.bars(args.out.with_suffix(".png"), "Waiting for a picture, bulk run beside it", "p95, x idle", bars)
    return 0


def parts(args: argparse.Namespace) -> Iterator[tuple[str, str, Mapping[str, Sequence[float]]]]:
    """Name, title and latencies: by the modelled clock, measured here, and through whole services on the CPU."""
    curve, clock = Curve.of(args), ModelClock()
    machine = Machine(lambda: modelled_engine(clock, curve, MODEL_UNITS), clock, MODEL_UNITS, SIZES)
    title = f"modelled: {args.call_ms:g} ms a call + {args.row_ms:g} ms a U-Net row of 64 x 64"
    yield "modelled", title, latencies(machine, args.seed, dict.fromkeys(WAYS, args.samples))
    if args.measured:
        model = load_model(shipped_model(), args.device, args.dtype)
        machine = Machine(lambda: Engine(model, max_units=MINI_UNITS), WallClock(), MINI_UNITS, MINI_SIZES)
        few = max(1, args.measured // 4)  # they take long, and are far away from the others
        samples = {URGENT: args.measured, PLAIN: few, SLOWEST: few, EQUAL: few}
        yield "measured", f"measured: the shipped model, {args.dtype}", latencies(machine, args.seed, samples)
    if args.service and args.device == "cpu":
        for pack in PACKS:
            packs = "packs as by default" if pack is None else f"packs of {pack}"
            for lane, seconds in through_workers(args.service, args.seed, pack):
                yield f"{lane}, {packs}", f"through a full worker, {lane}, fp32, {packs}", seconds


if __name__ == "__main__":
    sys.exit(main())
