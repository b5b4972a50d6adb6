"""The urgent job of `benchmarks.urgent` through a whole service: from its submit to the moment its picture is stored.

A worker whose every slot is taken by bulk jobs answers no bell: its lookout finds the urgent job (`worker/lookout.py`),
so here the latency has that wait, the claim, the PNG and the upload in it, on both sides of the ratio but for the wait.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.service_ways import LANES, Bench, Service, jobs_of
from jobs import State
from jobs.fields import URGENT_PRIORITY
from tests.integration.processes import wait_until

HELD = 16  # jobs of a worker
# The most bulk pictures of a pack; None: as many as the engine takes by default, five on a CPU. An urgent job waits for
# the step that runs when it comes, and on a CPU that takes as many times as long as it has pictures: of sixteen, most
# of a picture's time.
PACKS = (None, 16)
# Of the shipped model: one or two seconds a picture on two cores, as a graphics card takes for one.
SIDE = 320
STEPS = 20
BULK = "bulk"
URGENT = "ours, urgent"


def through_workers(samples: int, seed: int, pack: int | None) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Lane and latencies in seconds: `idle`, and `URGENT` beside a bulk run that fills the worker.

    pack: one of `PACKS`.
    """
    with tempfile.TemporaryDirectory(prefix="nightshift-urgent-") as folder, ExitStack() as stack:
        limit = [] if pack is None else ["--max-units", str(2 * pack * (SIDE // 8) ** 2)]
        bench = Bench(Path(folder), stack, ["--concurrency", str(HELD), *limit])
        for lane in LANES:
            with bench.service(lane, os.cpu_count() or 1) as service:
                found = latencies(service, samples, random.Random(seed))
            yield lane, found


def latencies(service: Service, samples: int, rng: random.Random) -> dict[str, list[float]]:
    """Of one worker: first idle, then full."""
    service.draw([wanted(rng)])  # warm
    idle = [service.draw([wanted(rng)]) for _ in range(samples)]
    bulk = service.client.batch(BULK)
    service.client.submit_many(jobs_of(HELD * (2 * samples + 2), STEPS, SIDE, 0), batch=BULK)
    wait_until(lambda: bulk.counts()[State.running] == HELD, "a full worker", service.log)
    full = []
    for _ in range(samples):
        time.sleep(rng.uniform(0.0, idle[0]))  # a random moment of the bulk run
        full.append(service.draw([wanted(rng)]))
    assert bulk.counts()[State.queued] > 0, "the bulk run ended too soon"
    return {"idle": idle, URGENT: full}


def wanted(rng: random.Random) -> Mapping[str, Any]:
    """The job that somebody waits for."""
    return {**jobs_of(1, STEPS, SIDE, rng.randrange(2**32))[0], "steps": STEPS, "priority": URGENT_PRIORITY}
