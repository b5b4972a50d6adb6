"""`python -m benchmarks.submit`: rows a second from a file into the database, and what the bell adds.

What is measured is `nightshift bulk` itself: the file is read, each row validated, all are inserted in one transaction,
and then the bells ring. Beside it, in the same run and in turn: rows that are ready made, inserted by SQLAlchemy's
executemany and by PostgreSQL's COPY into the same tables; and Celery's own publishing, a message a job, for a tenth of
them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psycopg
import sqlalchemy as sa
from celery import Celery

from benchmarks import plots, report
from benchmarks.goals import Goal, as_json, at_least, at_most, spread
from jobs import commands
from jobs.bell import TASK, Bell, queue_name, transport_options
from jobs.bulkfile import read_bulk
from jobs.models import job
from jobs.store import Store
from jobs.store_insert import ordered_ids
from tests import servers
from tests.faults import lanes

EXAMPLES = """examples:
  python -m benchmarks.submit                      100,000 rows, 3 rounds
  python -m benchmarks.submit --rows 1000000 --rounds 1
  python -m benchmarks.submit --quick              a few hundred rows, seconds"""
DATABASES = ("sqlite", "postgresql")
SAMPLERS = ("euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras")
#: One message in so many: Celery's own publishing of all would take longer than everything else together.
CELERY_SHARE = 10
COLUMNS = (
    *("id", "batch_id", "idempotency_key", "state", "spec", "model", "urgency", "attempts", "max_attempts"),
    *("created_at", "available_at", "rung_at"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One `nightshift bulk`. Seconds; `bell_s` is 0 where nobody rings."""

    total_s: float
    read_s: float
    store_s: float
    bell_s: float


class Bench:
    """Servers, an empty database of each kind to be copied, and the file."""

    def __init__(self, folder: Path, stack: ExitStack, rows: int) -> None:
        self.folder, self.rows, self._numbers = folder, rows, itertools.count()
        self._postgres = stack.enter_context(servers.postgres_server())
        self.redis = stack.enter_context(servers.redis_server())
        self._empty_file = lanes.migrated_file(folder)
        self._empty_database = lanes.migrated_database(self._postgres)
        self.file = folder / "night.jsonl"
        self.file.write_text("".join(f"{json.dumps(line)}\n" for line in night(rows)), "utf-8")

    @contextmanager
    def fresh(self, kind: str) -> Iterator[str]:
        """The URL of an empty database with its tables."""
        number = next(self._numbers)
        if kind == "sqlite":
            copy = self.folder / f"{number}.db"
            shutil.copy(self._empty_file, copy)
            yield f"sqlite:///{copy}"
            for left in self.folder.glob(f"{number}.db*"):
                left.unlink()
            return
        name = f"submit_{number}"
        with psycopg.connect(self._postgres, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {self._empty_database}".encode())
            yield self._postgres.rpartition("/")[0] + f"/{name}"
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def night(rows: int, seed: int = 1) -> Iterator[Mapping[str, Any]]:
    """Rows of a file, as somebody may write it for a night: no two alike, half of them without a seed."""
    rng = random.Random(seed)
    for number in range(rows):
        drawn = {"seed": rng.randrange(2**32)} if number % 2 else {}
        yield {
            "prompt": f"a castle on a hill above the sea, number {number}, oil on canvas, evening light",
            "negative_prompt": "blurry, low contrast",
            "steps": rng.randint(10, 50),
            "guidance": round(rng.uniform(1.0, 12.0), 1),
            "sampler": rng.choice(SAMPLERS),
        } | drawn


# Ours


def bulk(bench: Bench, kind: str, broker: str) -> Run:
    """`nightshift bulk` of the file, with a stopwatch at each stage."""
    seconds: dict[str, float] = defaultdict(float)
    with bench.fresh(kind) as url, ExitStack() as stack:
        settings = {"HOME": str(bench.folder / "home"), "DATABASE_URL": url, "BROKER_URL": broker}
        stack.enter_context(patch.dict(os.environ, {f"NIGHTSHIFT_{name}": value for name, value in settings.items()}))
        stages = ((commands, "_read", "read"), (Store, "submit", "store"), (Bell, "ring", "bell"))
        for owner, name, stage in stages:
            stack.enter_context(patch.object(owner, name, _timed(getattr(owner, name), stage, seconds)))
        printed = stack.enter_context(redirect_stdout(StringIO()))
        began = time.monotonic()
        commands.bulk.main([str(bench.file), "--batch", "night"], standalone_mode=False)
        total_s = time.monotonic() - began
    assert f"{bench.rows} jobs enqueued" in printed.getvalue()
    return Run(total_s, seconds["read"], seconds["store"], seconds["bell"])


def _timed(call: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        try:
            return call(*arguments, **named)
        finally:
            seconds[stage] += time.monotonic() - began

    return timed


# The others


def ready_made(bench: Bench) -> list[tuple[Any, ...]]:
    """Rows as wide as ours, as a driver takes them: nothing is left to be read or validated."""
    now = datetime.now(UTC)
    specs = [row.spec for row in read_bulk(bench.file) if row.spec is not None]
    ids = ordered_ids(len(specs), time.time_ns() // 1_000_000, random.Random(1))
    return [
        (id, None, None, "queued", spec.model_dump_json(), spec.model, 9, 0, 3, now, now, now)
        for id, spec in zip(ids, specs, strict=True)
    ]


def executemany(bench: Bench, kind: str, rows: Sequence[tuple[Any, ...]]) -> float:
    """Rows a second of SQLAlchemy's INSERT of many."""
    named = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    with bench.fresh(kind) as url, closing(Store.open(url)) as store:
        began = time.monotonic()
        with store.engines.writer.begin() as connection:
            for start in range(0, len(named), 2000):
                connection.execute(sa.insert(job), named[start : start + 2000])
        return len(rows) / (time.monotonic() - began)


def copy(bench: Bench, rows: Sequence[tuple[Any, ...]]) -> float:
    """Rows a second of PostgreSQL's COPY, the fastest way in that there is."""
    with bench.fresh("postgresql") as url, psycopg.connect(url) as connection:
        began = time.monotonic()
        with connection.cursor() as cursor, cursor.copy(f"COPY job ({', '.join(COLUMNS)}) FROM STDIN".encode()) as into:
            for row in rows:
                into.write_row(row)
        connection.commit()
        return len(rows) / (time.monotonic() - began)


def celery_publishing(bench: Bench, rows: Sequence[tuple[Any, ...]]) -> float:
    """Messages a second of Celery's `send_task`, one after the other, to the same broker."""
    app = Celery("raw", broker=bench.redis, set_as_current=False)
    app.conf.update(result_backend=None, broker_transport_options=dict(transport_options(bench.redis)))
    ids = [str(row[0]) for row in rows[: max(1, len(rows) // CELERY_SHARE)]]
    with closing(app), app.producer_or_acquire() as producer:
        began = time.monotonic()
        for job_id in ids:
            app.send_task(TASK, [job_id], queue=queue_name("raw"), ignore_result=True, producer=producer)
        return len(ids) / (time.monotonic() - began)


# All of it


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    """Everything in turn, so that what else the machine does hits all of them."""
    ready = ready_made(bench)
    ours: dict[str, list[Run]] = defaultdict(list)
    others: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, Callable[[], float]] = {
        **{f"executemany_{kind}": partial(executemany, bench, kind, ready) for kind in DATABASES},
        "copy_postgresql": partial(copy, bench, ready),
        "celery_publish": partial(celery_publishing, bench, ready),
    }
    for _ in range(rounds):
        for kind in DATABASES:
            ours[f"{kind}"].append(bulk(bench, kind, "memory://"))
            ours[f"{kind}_and_bell"].append(bulk(bench, kind, bench.redis))
        for name, call in theirs.items():
            others[name].append(call())
    return {
        "rows": bench.rows,
        "rounds": rounds,
        "rows_per_s": {name: spread([bench.rows / run.total_s for run in runs]) for name, runs in ours.items()},
        "us_per_row": {name: _stages(runs, bench.rows) for name, runs in ours.items()},
        "others_rows_per_s": {name: spread(values) for name, values in others.items()},
        "bell_adds": {
            kind: spread([run.bell_s / (run.total_s - run.bell_s) for run in ours[f"{kind}_and_bell"]], 3)
            for kind in DATABASES
        },
        "bells_per_s": spread([bench.rows / run.bell_s for kind in DATABASES for run in ours[f"{kind}_and_bell"]]),
    }


def _stages(runs: Sequence[Run], rows: int) -> dict[str, dict[str, float | int]]:
    stages = ("read_s", "store_s", "bell_s", "total_s")
    return {stage[:-2]: spread([1e6 * getattr(run, stage) / rows for run in runs]) for stage in stages}


def goals(result: Mapping[str, Any]) -> list[Goal]:
    """The issue's goals."""
    found = []
    for kind in DATABASES:
        rate = result["rows_per_s"][f"{kind}_and_bell"]["median"]
        found.append(at_least(f"rows/s from a file into {kind}, bells rung, >= 10,000", rate, 10_000))
        added = result["bell_adds"][kind]["median"]
        found.append(at_most(f"the bell adds to it, of the rest's time, <= 0.2, {kind}", added, 0.2))
    return found


def table(result: Mapping[str, Any], reached: Sequence[Goal]) -> str:
    """The result in words."""
    lines = [f"{result['rows']} rows, median of {result['rounds']} rounds (least - most)"]
    for name, rate in {**result["rows_per_s"], **result["others_rows_per_s"], "bells": result["bells_per_s"]}.items():
        lines.append(f"{name:28}{rate['median']:12,.0f}/s  ({rate['least']:,.0f} - {rate['most']:,.0f})")
        if name in result["us_per_row"]:
            stages = result["us_per_row"][name].items()
            lines.append(" " * 28 + "us a row: " + ", ".join(f"{stage} {us['median']:.1f}" for stage, us in stages))
    return "\n".join([*lines, *(goal.line for goal in reached)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.submit",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=100_000, help="of the file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of everything (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="400 rows, one round")
    parser.add_argument("--out", type=Path, help="JSON, the plot beside it; default: benchmarks/results/submit.json")
    options = parser.parse_args(arguments)
    options.out = options.out or report.result_file("submit.json", quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="nightshift-submit-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), stack, 400 if options.quick else options.rows)
        result = measure(bench, 1 if options.quick else options.rounds)
    reached = goals(result)
    print(table(result, reached))
    about = {"servers": "SQLite, synchronous=NORMAL; PostgreSQL, fsync=off; Redis; all on this machine"}
    report.write(
        options.out,
        about | result | {"goals": as_json(reached)},
        beside=("celery", "kombu", "redis", "sqlalchemy", "psycopg", "pydantic"),
    )
    rates = {**result["rows_per_s"], **result["others_rows_per_s"]}
    plots.bars(
        options.out.with_suffix(".png"),
        f"{result['rows']} rows from a file into the database",
        "rows a second",
        {name: rate["median"] for name, rate in rates.items()},
    )


if __name__ == "__main__":
    main()
