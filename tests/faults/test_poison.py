"""Rows 36 to 40, 49: a job that is too large, that raises, hangs, or takes its process with it, hurts no other."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import suppress

import pytest

from jobs import JobView, State
from jobs.errors import JobConflict
from jobs.models import MAX_SOLO_CRASHES
from tests.faults.checker import check
from tests.faults.harness import CALM, Guardian, Night
from tests.faults.lanes import only
from tests.faults.supervised import Supervised
from worker.exit_codes import HUNG

INNOCENTS = 7


def with_innocents(night: Night, prompt: str, **fields: object) -> JobView:
    """One job that misbehaves, among seven that do not, in any order."""
    before = night.rng.randint(0, INNOCENTS)
    night.submit(before, steps=20)
    (guilty,) = night.submit(1, prompt=prompt, steps=20, **fields)
    night.submit(INNOCENTS - before, steps=20)
    return guilty


def test_row_36_a_pack_that_finds_no_memory_is_made_smaller(night: Night) -> None:
    """out of memory in the middle of a pack"""
    night.submit(16)
    worker = night.worker(oom_rows=night.rng.randint(1, 5), **CALM)
    night.wait_ended()
    assert check(night, broker=True)
    worker.stop()


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.fault_slice), 2])
def test_row_37_a_job_that_aborts_its_process_takes_no_other_along(night: Night, workers: int) -> None:
    """a job that aborts the process, among 7 innocents"""
    poison = with_innocents(night, "poison")
    with Guardian(night, workers, step_s=0.004) as guardian:
        ended = night.wait_ended()
    assert set(guardian.deaths) == {-signal.SIGABRT}
    assert len(guardian.deaths) <= 1 + MAX_SOLO_CRASHES
    assert ended[poison.id].solo_crashes == MAX_SOLO_CRASHES
    assert "stopped answering" in str(ended[poison.id].error)
    assert check(night, failed={poison.id}, duplicates=INNOCENTS, orphans=INNOCENTS)


def test_row_38_a_job_that_raises_fails_alone_with_its_traceback(night: Night) -> None:
    """a job that raises each time, among 7 innocents"""
    guilty = with_innocents(night, "raises")
    worker = night.worker(step_s=0.004, **CALM)
    failed = night.wait_ended()[guilty.id]
    assert "Misdeed" in str(failed.error)
    assert "Traceback" in str(failed.traceback) and "fake_runner.py" in str(failed.traceback)
    assert (failed.attempts, failed.solo_crashes) == (3, 0)
    assert check(night, failed={guilty.id}, broker=True)
    worker.stop()


def test_row_38_a_job_that_breaks_the_whole_step_fails_alone(night: Night) -> None:
    """a job that makes the step of all raise each time"""
    guilty = with_innocents(night, "breaks")
    worker = night.worker(step_s=0.004, **CALM)
    failed = night.wait_ended()[guilty.id]
    assert "Misdeed" in str(failed.error) and "fake_runner.py" in str(failed.traceback)
    assert (failed.attempts, failed.solo_crashes) == (3, 0)
    assert check(night, failed={guilty.id}, duplicates=INNOCENTS, broker=True)
    worker.stop()


def test_row_39_a_step_that_hangs_ends_the_process(night: Night) -> None:
    """a step that never returns, with the interpreter free"""
    guilty = with_innocents(night, "hangs")
    with Guardian(night, 1, step_s=0.004, step_limit_s=1.5) as guardian:
        failed = night.wait_ended()[guilty.id]
    assert set(guardian.deaths) == {HUNG}
    assert len(guardian.deaths) <= 1 + MAX_SOLO_CRASHES
    assert failed.error
    assert check(night, failed={guilty.id}, duplicates=INNOCENTS, orphans=INNOCENTS)


@only("embedded")
@pytest.mark.fault_seeds(5)
def test_row_39_a_process_that_hangs_is_ended_by_its_supervisor(night: Night) -> None:
    """a step that never returns, and holds the interpreter"""
    guilty = with_innocents(night, "spins")
    with Supervised(night, hang_limit_s=3.0, step_s=0.004) as supervised:
        failed = night.wait_ended(timeout=240)[guilty.id]
        deaths = len(supervised.pids()) - 1
    assert 1 <= deaths <= 1 + MAX_SOLO_CRASHES
    assert failed.error
    assert check(night, failed={guilty.id}, duplicates=INNOCENTS, orphans=INNOCENTS)


@pytest.mark.parametrize("action", ["memory", "exit", "interrupt"])
def test_row_40_what_a_task_thread_raises_never_costs_a_slot(night: Night, action: str) -> None:
    """MemoryError, SystemExit, KeyboardInterrupt in the task's thread, 100 times"""
    # One in two claims raises; a job has three attempts, so about one in eight ends as failed.
    night.submit(150, steps=3)
    worker = night.worker(failpoint=f"after_claim:{action}@p=0.5,seed={night.seed}", **CALM)
    night.wait_ended()
    states = Counter(view.state for view in night.ended.values())
    raised = sum(view.attempts for view in night.ended.values()) - states[State.succeeded]
    assert raised >= 100 - 20  # by chance; 131 on average
    assert states[State.failed] < 50
    # All of its slots still take jobs, at the same time.
    night.submit(40, steps=400)
    night.wait_until(lambda: night.client.counts()[State.running] == worker.options["concurrency"], "a full worker")
    for view in night.client.jobs():
        if not view.ended:
            with suppress(JobConflict):  # it has ended meanwhile
                night.client.cancel(view)
    night.wait_ended()
    failed = {id for id, view in night.ended.items() if view.state is State.failed}
    everything = [job.id for job in night.jobs]
    cancelled = {id for id, view in night.ended.items() if view.state is State.cancelled}
    assert check(night, failed=failed, cancelled=cancelled, charged=everything)
    worker.stop()


def test_row_49_a_process_ended_for_its_memory_is_like_any_other_crash(night: Night) -> None:
    """the machine runs out of memory, and the kernel kills the process"""
    glutton = with_innocents(night, "eats")
    with Guardian(night, 1, kill_above_bytes=2**30, step_s=0.004) as guardian:
        ended = night.wait_ended()
    assert set(guardian.deaths) == {-signal.SIGKILL}
    assert len(guardian.deaths) <= 1 + MAX_SOLO_CRASHES
    assert ended[glutton.id].solo_crashes == MAX_SOLO_CRASHES
    assert check(night, failed={glutton.id}, duplicates=INNOCENTS, orphans=INNOCENTS)


def test_row_49_a_process_that_is_refused_memory_goes_on_without_the_job(night: Night) -> None:
    """RLIMIT_AS: the process is refused memory"""
    glutton = with_innocents(night, "asks")
    worker = night.worker(step_s=0.004, limits={"AS_MORE": 2**32}, **CALM)
    failed = night.wait_ended()[glutton.id]
    assert "MemoryError" in str(failed.error) or "memory" in str(failed.error)
    assert check(night, failed={glutton.id}, duplicates=INNOCENTS)
    worker.stop()
