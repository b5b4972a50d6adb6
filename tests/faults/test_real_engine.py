"""Rows 1, 8 and 37 once more: `nightshift worker` itself, its supervisor, and the shipped model."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
from PIL import Image

from jobs import JobView, State
from jobs.models import MAX_SOLO_CRASHES
from sd_engine import Engine, Request, load_model, shipped_model
from tests.faults.checker import check, keys_in
from tests.faults.harness import PATIENCE_S, Night
from tests.faults.zygote import ROOT, die_with_parent

pytestmark = pytest.mark.fault_seeds(3)

LEASE_S, GRACE_S = 4.0, 2.0
FIELDS = {"sampler": "dpmpp_2m_karras", "guidance": 4.0}
AT_MOST = 1
"""Levels of 255 by which a pixel may differ: kernels round otherwise for other numbers of rows."""


@contextlib.contextmanager
def nightshift_worker(night: Night) -> Iterator[subprocess.Popen[bytes]]:
    """The command with its supervisor; killed at the end if it still runs, and so is its child."""
    options = {"--lease-seconds": LEASE_S, "--heartbeat-seconds": 1.0, "--grace-seconds": GRACE_S, "--threads": 1}
    command = [sys.executable, "-m", "worker", "--device", "cpu", "--concurrency", "8"]
    command += [word for name, value in options.items() for word in (name, str(value))]
    with night.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | night.environment() | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def children(night: Night) -> list[int]:
    """The workers that heard bells, in the order of their start."""
    return [int(pid) for pid in re.findall(r"worker [^ :]+:(\d+):\S+ ready:", night.log_text())]


def stop(night: Night, supervisor: subprocess.Popen[bytes]) -> None:
    supervisor.terminate()
    assert supervisor.wait(PATIENCE_S) == 0, night.tail()


@cache
def engine() -> Engine:
    return Engine(load_model(shipped_model()))


def assert_as_undisturbed(night: Night, job: JobView) -> None:
    """The stored picture is the one that the engine draws for this job alone."""
    spec = job.spec
    request = Request(
        spec.prompt, seed=spec.seed or 0, steps=spec.steps, guidance=spec.guidance, sampler=spec.sampler,
        width=spec.width, height=spec.height,
    )  # fmt: skip
    (alone,) = engine().render([request])
    with Image.open(io.BytesIO(night.client.image_bytes(job.id))) as picture:
        stored = np.asarray(picture)
    assert np.abs(stored.astype(int) - alone.astype(int)).max() <= AT_MOST


def test_row_01_a_real_worker_killed_among_its_steps_loses_nothing(night: Night) -> None:
    """kill -9 of `nightshift worker` with the shipped model; its supervisor starts another"""
    jobs = night.submit(8, steps=16, **FIELDS)
    with nightshift_worker(night) as supervisor:
        night.wait_running(4)
        os.kill(children(night)[0], signal.SIGKILL)
        night.wait_ended(2 * PATIENCE_S)
        assert len(children(night)) == 2
        stop(night, supervisor)
    assert check(night, pictures=False, orphans=8)
    assert_as_undisturbed(night, night.rng.choice(jobs))


def test_row_08_a_real_worker_gives_back_what_another_goes_on_with(night: Night) -> None:
    """SIGTERM of `nightshift worker` with the shipped model, jobs longer than the grace time"""
    jobs = night.submit(6, steps=60, **FIELDS)
    with nightshift_worker(night) as supervisor:
        night.wait_running(6)
        threading.Event().wait(night.rng.uniform(0.2, 1.0))
        stop(night, supervisor)
    assert {view.state for view in night.views().values()} == {State.queued}
    assert {view.attempts for view in night.views().values()} == {0}
    assert len([key for key in keys_in(night) if key.startswith("saved/")]) == len(jobs)
    with nightshift_worker(night) as supervisor:
        night.wait_ended(2 * PATIENCE_S)
        stop(night, supervisor)
    assert check(night, pictures=False)
    assert_as_undisturbed(night, night.rng.choice(jobs))


def test_row_37_a_job_that_takes_real_workers_with_it_hurts_no_other(night: Night) -> None:
    """SIGABRT of `nightshift worker`, with the shipped model, whenever it draws one of 8 jobs"""
    night.submit(7, steps=2, **FIELDS)
    (poison,) = night.submit(1, steps=60, **FIELDS)
    deaths: set[int] = set()
    done = threading.Event()

    def abort() -> None:
        while not done.wait(0.02):
            owner = night.owners(State.running).get(poison.id)
            if owner is not None and (pid := int(owner.split(":")[-2])) not in deaths:
                deaths.add(pid)
                os.kill(pid, signal.SIGABRT)

    killer = threading.Thread(target=abort, daemon=True)
    killer.start()
    with nightshift_worker(night) as supervisor:
        failed = night.wait_ended(2 * PATIENCE_S)[poison.id]
        done.set()
        killer.join()
        stop(night, supervisor)
    assert len(deaths) <= 1 + MAX_SOLO_CRASHES
    assert failed.solo_crashes == MAX_SOLO_CRASHES
    assert check(night, failed={poison.id}, pictures=False, orphans=8)
