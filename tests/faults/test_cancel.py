"""Rows 41 and 42: what is cancelled stays cancelled, wherever its job was at that moment."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from jobs import JobConflict, State
from tests.faults.checker import check
from tests.faults.harness import CALM, SLACK_S, Night, Worker

#: Every place between a job's claim and its end, in that order.
ON_ITS_WAY = (
    "before_claim_commit", "after_claim", "step", "before_upload", "half_put", "after_upload", "before_finish_commit",
    "after_finish_commit", "before_ack",
)  # fmt: skip


def is_stopped(worker: Worker) -> bool:
    """Whether the process sleeps at its failpoint."""
    try:
        return Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


@pytest.mark.fault_slice
def test_row_41_a_queued_job_is_cancelled_at_once(night: Night) -> None:
    """cancel of queued jobs"""
    jobs = night.submit(6)
    cancelled = night.rng.sample(jobs, 3)
    assert {night.client.cancel(job) for job in cancelled} == {State.cancelled}
    worker = night.worker(**CALM)
    night.wait_ended()
    assert check(night, cancelled={job.id for job in cancelled}, broker=True)
    assert not {job.spec.prompt for job in cancelled} & {entry.prompt for entry in night.entries()}
    worker.stop()


@pytest.mark.fault_slice
def test_row_41_a_running_job_stops_within_a_step(night: Night) -> None:
    """cancel of running jobs"""
    jobs = night.submit(8, steps=900)
    worker = night.worker(step_s=0.01, **CALM)
    night.wait_steps(jobs)
    cancelled = night.rng.sample(jobs, 4)
    asked = time.monotonic()
    assert {night.client.cancel(job) for job in cancelled} == {State.running}
    night.wait_until(lambda: all(night.states()[job.id] is State.cancelled for job in cancelled), "their end")
    assert time.monotonic() - asked < worker.options["poll_s"] + 0.01 + SLACK_S
    for job in set(jobs) - set(cancelled):
        night.client.cancel(job)
    night.wait_ended()
    assert not night.entries("drawn")
    assert check(night, cancelled={job.id for job in jobs}, broker=True)
    worker.stop()


@pytest.mark.parametrize("where", ON_ITS_WAY)
def test_row_41_a_cancel_holds_wherever_the_job_is(night: Night, where: str) -> None:
    """cancel at every place between claim and ack"""
    if where == "half_put" and night.lane == "production":
        where = "before_upload"  # S3's half puts are nobody's to see
    worker = night.worker(failpoint=f"{where}:stop@nth={1 if where != 'half_put' else 2}", **CALM).ready()
    (job,) = night.submit(1)
    night.wait_until(lambda: is_stopped(worker), f"a worker that stopped at {where}")
    answers: list[State | None] = []

    def cancel() -> None:
        try:
            answers.append(night.client.cancel(job))
        except JobConflict:
            answers.append(None)

    # In a thread: inside a transaction the stopped worker holds the row, or on SQLite the whole database.
    asking = threading.Thread(target=cancel)
    asking.start()
    asking.join(night.rng.uniform(0.05, 0.3))
    worker.kill(18)  # SIGCONT
    asking.join()
    ended = night.wait_ended()[job.id]
    assert (ended.state is State.succeeded) == (answers == [None]), f"{where}: {answers}, {ended.state}"
    if where in ("after_finish_commit", "before_finish_commit"):
        assert answers == [None]
    night.submit(2)
    night.wait_ended()
    # No object of the cancelled job is left, and the worker goes on.
    assert check(night, either={job.id}, broker=True)
    worker.stop()


def test_row_41_a_cancel_after_the_end_is_a_conflict(night: Night) -> None:
    """cancel of jobs that have ended"""
    worker = night.worker(**CALM)
    (done,) = night.submit(1)
    (failed,) = night.submit(1, model="another")  # nobody here serves it
    night.client.cancel(failed)
    night.wait_ended()
    for job in (done, failed):
        with pytest.raises(JobConflict):
            night.client.cancel(job)
    assert check(night, cancelled={failed.id}, broker=False)
    worker.stop()


def test_row_42_a_cancelled_job_whose_worker_died_is_not_drawn_again(night: Night) -> None:
    """cancel and kill -9 at once"""
    jobs = night.submit(8, steps=900)
    doomed = night.worker(step_s=0.01)
    night.wait_steps(jobs)
    cancelled = night.rng.sample(jobs, 4)
    if night.rng.random() < 0.5:
        doomed.kill()
        for job in cancelled:
            night.client.cancel(job)
    else:
        for job in cancelled:
            night.client.cancel(job)
        doomed.kill()
    doomed.wait()
    peer = night.worker(step_s=0.001)
    night.wait_until(lambda: all(night.states()[job.id] is State.cancelled for job in cancelled), "their end")
    night.wait_ended()
    began = [entry.prompt for entry in night.entries("began") if entry.pid == peer.pid]
    assert not {job.spec.prompt for job in cancelled} & set(began)
    assert check(night, cancelled={job.id for job in cancelled}, orphans=8)
    peer.stop()
