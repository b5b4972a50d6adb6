"""`python -m benchmarks.service`: what is left of the engine's speed when a service is built around it.

The same jobs, on the CPU: drawn by the engine alone, and by `nightshift worker` from the queue, with database, broker,
PNG and storage; embedded (SQLite, a directory) and in production (PostgreSQL, Redis, S3 by rclone). By turns of a
second (`--turn`), in one run: each is stopped while the others draw. All of it shares the machine's cores with the
engine, which it would not beside a GPU: so the engine has one thread first, which leaves a core to the rest, and then
as many as there are cores; and the CPU seconds of the servers and of the worker's other threads are told beside the
loss.

What the service costs is a price a job, so its share is smaller the longer the engine takes for one
(`engine_ms_per_job`): a tenth to a sixth of a second for the shipped model's own size, far less than for any picture of
Stable Diffusion's. `--model sd15` draws with random weights of SD 1.5's size. Jobs of which a pack takes many should be
several times as many as a worker holds: the engine alone knows all of them at once, and packs the last ones better.
`of_the_fastest_engine` is the rate over that of the bare engine with the number of threads that is best for it: what a
machine gains or loses that has no core to spare.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from benchmarks.goals import Goal, as_json, at_least, spread
from benchmarks.scale_fleet import cpu_s
from benchmarks.service_turns import Run, Way, draw_by_turns
from benchmarks.service_ways import AGAIN, ALONE, LANES, Bench, DrawnWith, jobs_of, servers_cpu_s
from sd_engine.devices import DTYPES

EXAMPLES = """examples:
  python -m benchmarks.service                           192 pictures of 96 x 96 and 48 of 256 x 256, 20 steps
  python -m benchmarks.service --model sd15 --dtype bf16 --loads 256:8 --steps 10 --threads 2
  python -m benchmarks.service --loads 192:24            24 pictures of 192 x 192
  python -m benchmarks.service --quick                   two small jobs, seconds"""


@dataclass(frozen=True, slots=True)
class Load:
    """So many square pictures of one size in pixels."""

    side: int
    jobs: int


@dataclass(frozen=True, slots=True)
class Rounds:
    """How often everything is drawn, with how many steps a job on average, in turns of so many seconds."""

    count: int
    steps: int
    turn_s: float


def measure(bench: Bench, loads: Sequence[Load], threads: Sequence[int], rounds: Rounds) -> dict[str, Any]:
    """Each load with each number of threads; workers of one number live at a time."""
    told: dict[str, dict[str, Any]] = {}
    for number in threads:
        with bench.ways(number) as ways:
            for load in loads:
                told[_named(load, number)] = account(draw(ways, bench.drawing.model, load, rounds), load.jobs)
    for load in loads:
        alike = [told[_named(load, number)] for number in threads]
        best = max(found["images_per_s"][ALONE]["median"] for found in alike)
        for found in alike:
            for lane in LANES:
                found[lane]["of_the_fastest_engine"] = round(found["images_per_s"][lane]["median"] / best, 4)
    return told


def _named(load: Load, threads: int) -> str:
    return f"{load.side} x {load.side}, engine with {threads} threads"


def draw(ways: Mapping[str, Way], model: str, load: Load, rounds: Rounds) -> dict[str, list[Run]]:
    """By turns, so that what else the machine does meets all of them; the first jobs of each warm it up."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    draw_by_turns(ways, jobs_of(load.jobs, 2, load.side, 0, model), rounds.turn_s, cpu_s, servers_cpu_s)
    for round_ in range(rounds.count):
        jobs = jobs_of(load.jobs, rounds.steps, load.side, 1000 * round_, model)
        for name, run in draw_by_turns(ways, jobs, rounds.turn_s, cpu_s, servers_cpu_s).items():
            runs[name].append(run)
    return runs


def account(runs: Mapping[str, Sequence[Run]], count: int) -> dict[str, Any]:
    """Rates, each lane's efficiency in each round, and where the milliseconds of a job went."""
    alone = runs[ALONE]
    told: dict[str, Any] = {
        "images_per_s": {name: spread([count / run.wall_s for run in found], 4) for name, found in runs.items()},
        "engine_ms_per_job": _ms([run.wall_s for run in alone], count),
        # 1.0 but for the method's own noise: two equal ways.
        "engine_again": spread([bare.wall_s / run.wall_s for run, bare in zip(runs[AGAIN], alone, strict=True)], 4),
    }
    for lane in LANES:
        pairs = list(zip(runs[lane], alone, strict=True))
        lost = [run.wall_s - bare.wall_s for run, bare in pairs]
        told[lane] = {
            "efficiency": spread([bare.wall_s / run.wall_s for run, bare in pairs], 4),
            "lost_ms_per_job": spread([1e3 * seconds / count for seconds in lost], 2),
            "servers_cpu_ms_per_job": _ms([run.servers_cpu_s for run in runs[lane]], count),
            "worker_cpu_besides_engine_ms_per_job": _ms([run.own_cpu_s - bare.own_cpu_s for run, bare in pairs], count),
            "first_claim_ms": _ms([run.first_claim_s for run in runs[lane]], 1),
        }
    return told


def _ms(seconds: Sequence[float], count: int) -> float:
    return round(1e3 * statistics.median(seconds) / count, 2)


def goals(measured: Mapping[str, Any]) -> list[Goal]:
    """The issue's goal, for each lane, load and number of threads."""
    found = []
    for what, told in measured.items():
        for lane in LANES:
            row = told[lane]
            why = (
                f"{row['lost_ms_per_job']['median']} ms a job are lost; CPU of the servers "
                f"{row['servers_cpu_ms_per_job']} ms, of the worker besides the engine "
                f"{row['worker_cpu_besides_engine_ms_per_job']} ms"
            )
            name = f"{lane}, {what}: of the bare engine's images/s, >= 0.97"
            found.append(at_least(name, row["efficiency"]["median"], 0.97, why))
    return found


def table(measured: Mapping[str, Any], reached: Sequence[Goal]) -> str:
    """The result in words."""
    lines = []
    for what, told in measured.items():
        again = told["engine_again"]
        lines.append(f"{what}: {told['engine_ms_per_job']} ms of the engine a job")
        lines.append(f"  {AGAIN:13}{again['median']:8.3f} of itself ({again['least']} - {again['most']})")
        for name, rate in told["images_per_s"].items():
            lines.append(f"  {name:13}{rate['median']:8.3f} images/s ({rate['least']} - {rate['most']})")
        for lane in LANES:
            shown = {what: value for what, value in told[lane].items() if not isinstance(value, dict)}
            lost, share = told[lane]["lost_ms_per_job"], told[lane]["efficiency"]
            lines.append(f"  {lane:13}{share['median']:8.3f} of it ({share['least']} - {share['most']})")
            lines.append(f"    lost {lost['median']} ms a job; {shown}")
    return "\n".join([*lines, *(goal.line for goal in reached)])


def _turn(text: str) -> float:
    if not 0 < float(text) <= 3:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 3")
    return float(text)


def drawing_of(model: str, dtype: str, folder: Path) -> DrawnWith:
    """The shipped model, or one of SD 1.5's size, written into the folder in that dtype, so that all processes share
    the pages of its file; for float32 as it is usually found, in float16."""
    if model == "shipped":
        return DrawnWith(dtype=dtype)
    from benchmarks.parity_models import FAMILIES, write_model  # the reference's libraries take seconds to come

    path = write_model(FAMILIES[0], folder / model, DTYPES["fp16" if dtype == "fp32" else dtype])
    return DrawnWith(model, str(path), dtype)


def result_name(model: str, dtype: str) -> str:
    """Of the file; that of the shipped model in float32 has no suffix."""
    said = [word for word, usual in ((model, "shipped"), (dtype, "fp32")) if word != usual]
    return "_".join(["service", *said]) + ".json"


def _loads(text: str) -> list[Load]:
    return [Load(*map(int, load.split(":"))) for load in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.service",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=("shipped", "sd15"), default="shipped", help="sd15: of its size")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of all ways (default: %(default)s)")
    parser.add_argument("--loads", type=_loads, default="96:192,256:48", help="SIDE:JOBS,... (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of a job on average (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument(
        "--turn",
        type=_turn,
        default=1.0,
        help="seconds, at most 3: a lease must not end meanwhile (default: %(default)s)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=48,
        help="jobs that a worker holds (default: %(default)s; more at once draw so small pictures no faster)",
    )
    both = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", default=",".join(map(str, both)), help="of the engine (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two short jobs, one thread, one round")
    parser.add_argument(
        "--out", type=Path, help="JSON, the plot beside it; default: service.json, service_sd15_bf16.json"
    )
    options = parser.parse_args(arguments)
    options.out = options.out or report.result_file(result_name(options.model, options.dtype), quick=options.quick)
    if options.quick:
        options.loads, options.steps, options.rounds, options.threads = [Load(96, 2)], 2, 1, "1"
    threads = [int(number) for number in options.threads.split(",")]
    with tempfile.TemporaryDirectory(prefix="nightshift-service-") as folder, ExitStack() as stack:
        drawing = drawing_of(options.model, options.dtype, Path(folder))
        bench = Bench(Path(folder), stack, ["--concurrency", str(options.concurrency)], drawing)
        measured = measure(bench, options.loads, threads, Rounds(options.rounds, options.steps, options.turn))
    reached = goals(measured)
    print(table(measured, reached))
    about: dict[str, Any] = {
        name: getattr(options, name) for name in ("model", "dtype", "steps", "rounds", "turn", "concurrency")
    }
    about["loads"] = [asdict(load) for load in options.loads]
    about["servers"] = "SQLite, synchronous=NORMAL; PostgreSQL, fsync=off; Redis; S3 by rclone; all on this machine"
    report.write(options.out, about | {"measured": measured, "goals": as_json(reached)}, beside=("celery", "boto3"))
    plots.bars(
        options.out.with_suffix(".png"),
        "Images a second over those of the engine alone",
        "share",
        {f"{lane}, {what}": told[lane]["efficiency"]["median"] for what, told in measured.items() for lane in LANES},
    )


if __name__ == "__main__":
    main()
