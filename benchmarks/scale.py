"""`python -m benchmarks.scale`: 1 to 32 worker processes on one PostgreSQL and one Redis, and what 1,000 would ask.

The engine is the real one around a fake runner that sleeps. "gpu" are jobs as a GPU's worker has them: seconds that
cost the machine next to nothing, so that 32 workers fit into few cores and what is left to see is the queue. "cpu" are
jobs of 2 ms steps: there the cores end, and the table says where. The simulation takes the prices measured here.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import plots, report
from benchmarks.goals import Goal, as_json, at_least
from benchmarks.scale_fleet import Fleet, Kind, claim_latency, statements, throughput
from benchmarks.scale_simulation import House, Outcome, Prices, limits, simulate

EXAMPLES = """examples:
  python -m benchmarks.scale                    1 to 32 workers
  python -m benchmarks.scale --workers 1,64     these sizes of the fleet; the goal compares the last with the first
  python -m benchmarks.scale --quick            1 and 2 workers, seconds"""
SIZES = (1, 4, 16, 32)
FLEETS = (32, 100, 300, 1000, 2000, 4000)
GPU = Kind("gpu", steps=4, step_s=0.5, at_once=1)
CPU = Kind("cpu", steps=8, step_s=0.002, at_once=8)
QUICK = Kind("gpu", steps=4, step_s=0.05, at_once=1)
#: Jobs for each worker, and the most for all: with 2 ms steps two cores are full with one or two workers.
GPU_JOBS, CPU_JOBS, CPU_JOBS_MOST = 10, 150, 600


def measure(fleet: Fleet, sizes: Sequence[int], quick: bool) -> dict[str, Any]:
    """Everything but the simulation; each kind of job over all sizes of the fleet."""
    gpu, jobs = (QUICK, 2) if quick else (GPU, GPU_JOBS)
    samples, idle_s = (3, 1.0) if quick else (40, 10.0)
    cpu_jobs = {size: 10 if quick else min(CPU_JOBS * size, CPU_JOBS_MOST) for size in sizes}
    return {
        "statements_ms": statements(fleet, 20 if quick else 500),
        "gpu": [throughput(fleet, size, gpu, jobs * size) for size in sizes],
        "cpu": [throughput(fleet, size, CPU, cpu_jobs[size]) for size in sizes],
        "latency": [claim_latency(fleet, size, CPU, samples, idle_s) for size in sizes],
        "kinds": {kind.name: asdict(kind) for kind in (gpu, CPU)},
    }


def prices(measured: Mapping[str, Any]) -> Prices:
    """Of a statement alone, of a job where they are densest, for a database that serves a thousand workers is as busy,
    and of what is asked by the clock from the largest fleet that draws as GPUs do.

    `other_ms` is what neither the job's own statements nor those by the clock explain: looks whether a connection still
    answers, a ringer that a free slot wakes, a cache that others have filled.
    """
    dense, slow, alone = measured["cpu"][-1], measured["gpu"][-1], measured["statements_ms"]
    bare = Prices(
        alone,
        other_ms=0.0,
        redis_ms=dense["redis_ms_per_job"],
        connections=dense["connections_per_worker"],
        broker_clients=dense["broker_clients_per_worker"],
        redis_clock_ms=_redis_clock_ms(measured["gpu"], dense["redis_ms_per_job"]),
    )
    other_ms = dense["postgres_ms_per_job"] - bare.job_ms - dense["worker_s_per_job"] * bare.clock_ms
    dense_jobs = replace(bare, other_ms=max(0.0, round(other_ms, 3)))
    rarely = (slow["postgres_ms_per_job"] - dense_jobs.job_ms) / (slow["worker_s_per_job"] * bare.clock_ms)
    return replace(dense_jobs, rarely=max(1.0, round(rarely, 2)))


def _redis_clock_ms(fleets: Sequence[Mapping[str, Any]], job_ms: float) -> float:
    """Redis' CPU a second of what one worker asks by the clock: what the largest fleet costs besides its jobs and the
    smallest does not, for Redis works a little by itself. A busier Redis answers several at a time, for less."""
    first, last = fleets[0], fleets[-1]
    more = last["workers"] - first["workers"]
    besides = [row["workers"] / row["worker_s_per_job"] * (row["redis_ms_per_job"] - job_ms) for row in (first, last)]
    return max(0.0, round((besides[1] - besides[0]) / more, 3)) if more else 0.0


def simulated(measured: Mapping[str, Any], sizes: Sequence[int]) -> dict[str, Any]:
    """1,000 GPU workers and what breaks before, by the prices measured; a job a second from each GPU, and ten."""
    paid = prices(measured)
    found: dict[str, Any] = {"prices": asdict(paid), "postgres_ms_per_job_of_gpu_jobs": _held_against(paid, measured)}
    for rate in (1.0, 10.0):
        house = House(paid, jobs_per_s=rate)
        ends = limits(house)
        found[f"{rate:g}_jobs_per_s_and_gpu"] = {
            "house": {name: value for name, value in asdict(house).items() if name != "prices"},
            "breaks_first": min(ends, key=lambda name: ends[name]),
            "ends_at_workers": dict(sorted(ends.items(), key=lambda item: item[1])),
            "simulated": [asdict(outcome) for outcome in _until_broken(house, sizes)],
        }
    return found


def _held_against(paid: Prices, measured: Mapping[str, Any]) -> list[dict[str, float]]:
    """What jobs as a GPU has them cost PostgreSQL: as measured, and by the prices, which the last of these fits."""
    return [
        {
            "workers": row["workers"],
            "measured": row["postgres_ms_per_job"],
            "by the prices": round(paid.job_ms + row["worker_s_per_job"] * paid.clock_ms, 2),
        }
        for row in measured["gpu"]
    ]


def _until_broken(house: House, sizes: Sequence[int]) -> list[Outcome]:
    """No larger fleet than the first that loses half of its work: it would only be slower to compute."""
    outcomes: list[Outcome] = []
    for size in sizes:
        outcomes += simulate(house, [size])
        if outcomes[-1].efficiency < 0.5:
            break
    return outcomes


def efficiency(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(workers, jobs/s of the fleet over those of as many workers alone)."""
    one = rows[0]["jobs_per_s"] / rows[0]["workers"]
    return [(row["workers"], row["jobs_per_s"] / (one * row["workers"])) for row in rows]


def goals(measured: Mapping[str, Any]) -> list[Goal]:
    """The issue's goal for jobs as a GPU has them, and for those of 2 ms steps, with the limit of this machine."""
    found = []
    for kind in ("gpu", "cpu"):
        size, reached = efficiency(measured[kind])[-1]
        row = measured[kind][-1]
        told = measured["kinds"][kind]
        jobs = f"jobs of {told['steps']} x {told['step_s']} s"
        goal = f"{kind}: jobs/s at {size:g} workers over {size:g} x one, {jobs}, >= 0.9"
        job_ms = row["worker_ms_per_job"] + row["postgres_ms_per_job"] + row["redis_ms_per_job"]
        why = f"{row['cores_busy']:.2f} of {os.cpu_count()} cores are busy; a job costs {job_ms:.0f} ms of CPU"
        found.append(at_least(goal, reached, 0.9, why))
    return found


def table(result: Mapping[str, Any], reached: Sequence[Goal]) -> str:
    """The result in words."""
    lines = [f"{name:14}{value:8.3f} ms of PostgreSQL's CPU" for name, value in result["statements_ms"].items()]
    shown = (
        *("jobs_per_s", "cores_busy", "worker_ms_per_job", "postgres_ms_per_job", "postgres_cores_busy"),
        "redis_ms_per_job",
        *("transactions_per_job", "connections_per_worker", "broker_clients_per_worker"),
    )
    for kind in ("gpu", "cpu"):
        lines.append(f"{kind}: workers, {', '.join(shown)}")
        lines += ["  ".join(f"{row[name]:10}" for name in ("workers", *shown)) for row in result[kind]]
    for row in result["latency"]:
        wait = row["submit_to_claim_ms"]
        idle = row["idle_transactions_per_worker_s"], row["idle_postgres_ms_per_worker_s"]
        lines.append(f"{row['workers']} idle workers: submit to claim {wait['median']} ms, p95 {wait['p95']} ms")
        lines.append(f"  each asks {idle[0]} transactions a second, {idle[1]} ms of PostgreSQL's CPU")
    for name, case in result["simulation"].items():
        if "breaks_first" in case:
            lines.append(f"simulated, {name.replace('_', ' ')}: {case['breaks_first']} break first")
            lines += [f"  {part} end at {size} workers" for part, size in case["ends_at_workers"].items()]
            lines += [f"  {outcome}" for outcome in case["simulated"]]
    return "\n".join([*lines, *(goal.line for goal in reached)])


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Efficiency over the size of the fleet: measured, and simulated."""
    lines = {f"measured, {kind} jobs": efficiency(result[kind]) for kind in ("gpu", "cpu")}
    for name, case in result["simulation"].items():
        if "simulated" in case:
            points = [(outcome["workers"], outcome["efficiency"]) for outcome in case["simulated"]]
            lines[f"simulated, {name.replace('_', ' ')}"] = points
    plots.curves(
        path, "Jobs a second over those of as many workers alone", ("workers", "share"), lines, logarithmic=True
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workers", default=",".join(map(str, SIZES)), help="sizes of the fleet (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="1 and 2 workers, a few jobs")
    parser.add_argument("--out", type=Path, help="JSON, the plot beside it; default: benchmarks/results/scale.json")
    options = parser.parse_args(arguments)
    options.out = options.out or report.result_file("scale.json", quick=options.quick)
    sizes = (1, 2) if options.quick else tuple(int(size) for size in options.workers.split(","))
    with tempfile.TemporaryDirectory(prefix="nightshift-scale-") as folder, ExitStack() as stack:
        result = measure(Fleet(Path(folder), stack), sizes, options.quick)
    result["simulation"] = simulated(result, FLEETS[:2] if options.quick else FLEETS)
    reached = goals(result)
    print(table(result, reached))
    about = {
        "runner": "fake: a step sleeps and draws nothing; the rest is real, and the storage a directory",
        "servers": "PostgreSQL, fsync=off; Redis; all on this machine",
    }
    report.write(
        options.out, about | result | {"goals": as_json(reached)}, beside=("celery", "kombu", "sqlalchemy", "psycopg")
    )
    draw(options.out.with_suffix(".png"), result)


if __name__ == "__main__":
    main()
