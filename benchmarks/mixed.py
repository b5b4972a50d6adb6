"""A realistic night of jobs that differ: packs that are made anew for every step, against static batches.

    python -m benchmarks.mixed                       (a quarter of an hour on two cores)
    python -m benchmarks.mixed --quick               (seconds; says nothing about speed)
    python -m benchmarks.mixed --call-ms 20 --row-ms 2 --measured-jobs 0

The night, seeded: 10 to 50 steps, guidance 1 to 12, five samplers, 30 % from a picture with strengths 0.3 to 0.9, three
sizes, arrivals spread over half of the time that full packs would take. It is driven twice:

- measured: the shipped model on this machine, by its clock. What a batch saves here depends on how much less a row of a
  large U-Net call costs than a row alone; that is measured in the same run (`ms of a U-Net row`).
- modelled: the same kinds of jobs at Stable Diffusion's sizes, by a clock on which a U-Net call lasts what a stated
  curve says (`--call-ms` for each call, `--row-ms` for each U-Net row of 64 x 64 latents). A model, not a measurement.

The baselines are the same engine and modules with other batching: (a) one by one, (b) static batches of equal jobs,
(c) static batches in which every row waits for the slowest. All have one limit of a pack: eight guided pictures of 512
x 512 by the modelled clock, four of 128 x 96 measured, so that a short night has more than fits at once. Fill is units
whose step brings a picture on over units of the limit, of the packs beside which more rows of their lane waited, and
of all: a night's last packs have no company, so it falls with shorter nights. Prints tables, writes
`benchmarks/results/mixed.json` and a plot.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots
from benchmarks.goals import Goal, as_json, at_least
from benchmarks.nights import (
    CELLS_512,
    MINI_SIZES,
    SIZES,
    Curve,
    Job,
    ModelClock,
    Outcome,
    WallClock,
    add_curve,
    drive,
    modelled_engine,
    night,
    staggered,
    work,
)
from benchmarks.report import result_file, write
from benchmarks.static_batches import WAYS
from sd_engine import Engine, Model, load_model, shipped_model

OURS, ALONE, EQUAL, SLOWEST, _ = WAYS
MODEL_UNITS = 16 * CELLS_512  # the engine's own limit on a card: eight guided pictures of 512 x 512
MINI_UNITS = 8 * 16 * 12  # four guided pictures of the largest size: a short night must have more than fits at once
MINI_CELLS = 12 * 12
# Of the time that full packs take: before the night's middle work always waits, and then the packs run dry.
WINDOW = 0.5


def modelled(seed: int, jobs: int, curve: Curve) -> dict[str, Outcome]:
    """The night by a modelled clock, each way."""
    rng = random.Random(seed)
    requests = night(rng, jobs, SIZES)
    units_s = (curve.call_s / (MODEL_UNITS / CELLS_512) + curve.row_s) / CELLS_512  # in full packs
    coming = staggered(rng, requests, WINDOW * work(requests) * units_s)
    return {way: _drive_modelled(way, coming, curve) for way in WAYS}


def _drive_modelled(way: str, jobs: Sequence[Job], curve: Curve) -> Outcome:
    clock = ModelClock()
    return drive(modelled_engine(clock, curve, MODEL_UNITS), WAYS[way](MODEL_UNITS), jobs, clock)


def measured(model: Model, seed: int, jobs: int, repeats: int, row_s: float) -> dict[str, list[Outcome]]:
    """The night by this machine's clock: another night for each repeat, every way drives it before the next begins.

    row_s: of a U-Net row of the model's own size in a large call.
    """
    found: dict[str, list[Outcome]] = {way: [] for way in WAYS}
    drive(
        Engine(model),
        WAYS[OURS](MINI_UNITS),
        staggered(random.Random(seed), night(random.Random(seed), 2, MINI_SIZES), 0.0),
        WallClock(),
    )
    for repeat in range(repeats):
        rng = random.Random(seed + repeat)
        requests = night(rng, jobs, MINI_SIZES)
        coming = staggered(rng, requests, WINDOW * work(requests) * row_s / MINI_CELLS)
        for way in WAYS:
            found[way].append(drive(Engine(model), WAYS[way](MINI_UNITS), coming, WallClock()))
    return found


def row_costs(model: Model, rows: Sequence[int], repeats: int) -> dict[int, float]:
    """Milliseconds of a U-Net row in a call of so many, at the shipped model's own size: medians."""
    times: dict[int, list[float]] = {n: [] for n in rows}
    with torch.inference_mode():
        for _ in range(repeats):
            for n in rows:
                x_UCHW = torch.randn(n, model.unet.config.in_channels, 12, 12, dtype=model.dtype, device=model.device)
                context_UTD = torch.randn(n, 77, model.unet.config.context_width).to(x_UCHW)
                began = time.perf_counter()
                model.unet(x_UCHW, torch.full((n,), 500.0, device=model.device), context_UTD).cpu()
                times[n].append((time.perf_counter() - began) * 1000 / n)
    return {n: statistics.median(values) for n, values in times.items()}


def merged(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The medians of several nights' figures, and the spread of the first."""
    figures = [outcome.figures() for outcome in outcomes]
    rates = [outcome.images_per_s for outcome in outcomes]
    medians = {name: statistics.median(figure[name] for figure in figures) for name in figures[0]}
    return {**medians, "images_per_s_min_max": [min(rates), max(rates)]}


def goals(figures: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Each goal, and what was reached."""
    rate = {way: float(found["images_per_s"]) for way, found in figures.items()}
    return [
        at_least(f"images/s >= 1.5 x {SLOWEST}", rate[OURS] / rate[SLOWEST], 1.5),
        at_least(f"images/s >= 1.15 x {EQUAL}", rate[OURS] / rate[EQUAL], 1.15),
        at_least("fill while work waits >= 0.9", float(figures[OURS]["fill_while_work_waits"]), 0.9),
        at_least(
            "fill of all packs >= 0.9", float(figures[OURS]["fill"]), 0.9, "those included beside which none waits"
        ),
    ]


def show(title: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{title}")
    columns = ("images/s", "fill, work waits", "fill", "median, s", "p95, s", "U-Net calls", "ours is")
    print(" " * 35 + "".join(f"{column:>17}" for column in columns))
    for way, found in figures.items():
        ratio = figures[OURS]["images_per_s"] / found["images_per_s"]
        print(
            f"{way:35}{found['images_per_s']:17.3f}{found['fill_while_work_waits']:17.3f}{found['fill']:17.3f}"
            f"{found['latency_median_s']:17.2f}{found['latency_p95_s']:17.2f}{found['steps']:17.0f}{ratio:15.2f} x"
        )
    for goal in goals(figures):
        print(f"  {goal.line}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a handful of jobs")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--measured-jobs", type=int, default=480, help="of the shipped model; 0: do not measure")
    parser.add_argument("--repeats", type=int, default=1, help="measured nights, each with jobs of its own")
    parser.add_argument("--jobs", type=int, default=2000, help="of the modelled night")
    add_curve(parser)
    parser.add_argument("--device", default="cpu", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--dtype", default="fp32", help="fp32, bf16 or fp16")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/mixed.json")
    args = parser.parse_args(arguments)
    args.out = args.out or result_file("mixed.json", quick=args.quick)
    if args.quick:
        args.jobs, args.measured_jobs, args.repeats = min(args.jobs, 60), min(args.measured_jobs, 3), 1
    curve = Curve.of(args)
    model_night = {way: outcome.figures() for way, outcome in modelled(args.seed, args.jobs, curve).items()}
    show(
        f"modelled: {args.jobs} jobs, {args.call_ms:g} ms a call + {args.row_ms:g} ms a U-Net row of 64 x 64",
        model_night,
    )
    result: dict[str, Any] = {
        "modelled": {"curve": asdict(curve), "ways": model_night, "goals": as_json(goals(model_night))}
    }
    bars = {f"{way} (modelled)": figures["images_per_s"] for way, figures in model_night.items()}
    if args.measured_jobs:
        model = load_model(shipped_model(), args.device, args.dtype)
        costs = row_costs(model, (1, 2, 4, 8, 16), 3 if args.quick else 10)
        print("\nms of a U-Net row of the shipped model, by the rows of the call: ", end="")
        print(", ".join(f"{n}: {ms:.2f}" for n, ms in costs.items()))
        nights = measured(model, args.seed, args.measured_jobs, args.repeats, costs[8] / 1000)
        figures = {way: merged(outcomes) for way, outcomes in nights.items()}
        show(f"measured: {args.repeats} x {args.measured_jobs} jobs, the shipped model, {args.dtype}", figures)
        result["measured"] = {"ms_of_a_row": costs, "ways": figures, "goals": as_json(goals(figures))}
        bars |= {f"{way} (measured)": found["images_per_s"] for way, found in figures.items()}
    about = {"seed": args.seed, "jobs": args.jobs, "measured_jobs": args.measured_jobs, "repeats": args.repeats}
    write(args.out, {**about, "window": WINDOW, **result}, device=args.device)
    plots.bars(args.out.with_suffix(".png"), "A mixed night", "images a second", bars)
    return 0


if __name__ == "__main__":
    sys.exit(main())
