"""Rows 44, 46 to 48 and 51: what the machine, its clock and its operators do to workers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from uuid import UUID

import pytest
import sqlalchemy as sa

from jobs import JobView, State
from jobs.models import job as job_table
from tests.faults.checker import check
from tests.faults.harness import CALM, Night

HOUR_S = 3600.0


def fence_held(night: Night) -> None:
    """No lease was taken from a worker that lives."""
    assert "expired leases" not in night.log_text(), night.tail()


def test_row_44_workers_whose_clocks_are_wrong_keep_their_leases(night: Night) -> None:
    """a worker's clock an hour ahead, another's an hour behind"""
    night.submit(16, steps=300)
    workers = [night.worker(step_s=0.005, clock_step_s=step_s, **CALM) for step_s in (HOUR_S, -HOUR_S, 0.0)]
    night.wait_ended()
    fence_held(night)
    assert check(night, broker=True)
    for worker in workers:
        worker.stop()


def test_row_46_workers_started_at_once_never_share_a_name(night: Night) -> None:
    """many workers started at the same moment, on the same machine"""
    night.submit(40, steps=20)
    workers = [night.worker(**CALM) for _ in range(4)]
    for worker in workers:
        worker.ready()
    night.wait_ended()
    names = set(night.owners(State.succeeded).values())
    pids = {name.split(":")[-2] for name in names}
    assert len(names) == len(pids) and pids <= {str(worker.pid) for worker in workers}
    assert check(night, broker=True)
    for worker in workers:
        worker.stop()


def rewrite(night: Night, specs: Mapping[UUID, str]) -> None:
    """Change the stored specs of these jobs."""
    with night.store.engines.writer.begin() as connection:
        for id, spec in specs.items():
            connection.execute(sa.update(job_table).where(job_table.c.id == id).values(spec=spec))


def of_tomorrow(night: Night, *jobs: JobView) -> None:
    """Give these jobs a field that only the next version knows."""
    rewrite(night, {job.id: json.dumps(job.spec.model_dump(mode="json") | {"hologram": 1}) for job in jobs})


def test_row_47_an_old_worker_leaves_a_new_job_to_a_new_worker(night: Night) -> None:
    """rolling upgrade: a job with a field that an old worker does not know"""
    jobs = night.submit(6)
    of_tomorrow(night, *jobs[:2])
    old = night.worker(unreadable_s=2.0, paced_s=1.5, **CALM)
    night.wait_until(lambda: all(night.states()[job.id] is State.succeeded for job in jobs[2:]), "the old jobs")
    night.wait_until(lambda: all(night.client.get(job).error for job in jobs[:2]), "a reason at the others")
    assert {night.client.get(job).state for job in jobs[:2]} == {State.queued}
    old.stop()
    new = night.worker(knows=["hologram"], paced_s=1.5, **CALM)
    night.wait_ended()
    of_yesterday = {view.id for view in jobs[:2]}
    rewrite(night, {view.id: view.spec.model_dump_json() for view in jobs[:2]})  # the oracle is of today
    night.ended.clear()
    assert check(night, charged=of_yesterday)
    new.stop()


def test_row_47_a_job_that_no_worker_can_read_fails_with_the_reason(night: Night) -> None:
    """a job with a field that no worker knows"""
    jobs = night.submit(4)
    of_tomorrow(night, jobs[0])
    workers = [night.worker(unreadable_s=0.5, paced_s=1.5, **CALM) for _ in range(2)]
    failed = night.wait_ended()[jobs[0].id]
    assert "hologram" in str(failed.error)
    assert check(night, failed={jobs[0].id})
    for worker in workers:
        worker.stop()


@pytest.mark.parametrize("files", [40, 64, 96])
def test_row_48_a_worker_without_files_to_open_loses_nothing(night: Night, files: int) -> None:
    """RLIMIT_NOFILE"""
    night.submit(24)
    limited = night.worker(limits={"NOFILE": files})
    time.sleep(2.0)
    # It works, or it has ended with an error; it does not sit there with jobs that nobody draws.
    ended = limited.process.poll()
    assert ended != 0
    peer = night.worker()
    night.wait_ended()
    assert check(night, orphans=24, duplicates=24)
    peer.stop()
    limited.kill()


@pytest.mark.parametrize("more", [1, 3, 6, 10, 20])
def test_row_48_a_worker_without_threads_to_start_loses_nothing(night: Night, more: int) -> None:
    """threads cannot be started"""
    night.submit(24)
    limited = night.worker(limits={"THREADS": more})
    night.wait_until(
        lambda: limited.process.poll() is not None or night.client.counts()[State.succeeded], "its end, or its work"
    )
    assert limited.process.poll() != 0
    peer = night.worker()
    night.wait_ended()
    assert check(night, orphans=24, duplicates=24)
    peer.stop()
    limited.kill()


def test_row_51_workers_on_a_machine_without_a_free_core_keep_their_leases(night: Night) -> None:
    """other processes keep all cores busy"""
    for _ in range(os.cpu_count() or 1):
        night.fork("burn")
    # The proportions of the default, 30 and 10 seconds, and jobs that last longer than a lease.
    night.submit(8, steps=900)
    workers = [night.worker(step_s=0.008, lease_s=6.0, beat_s=2.0, concurrency=4) for _ in range(2)]
    night.wait_ended()
    fence_held(night)
    assert check(night, broker=True)
    for worker in workers:
        worker.stop()
