"""Rows 7 to 11: a worker that is told to leave does so in time, and takes nothing with it."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from jobs import State
from tests.faults.checker import check
from tests.faults.harness import CALM, SLACK_S, Night, Worker
from tests.faults.lanes import only
from tests.faults.s3_stub import faulty_s3

HELD = 8
LONG_STEPS, LONG_STEP_S = 600, 0.008
"""5 seconds of steps: more than fit a grace time of 4."""
SHORT_GRACE_S, LONG_GRACE_S = 4.0, 10.0
"""Not shorter: a tenth of it is all that there is for handing the jobs back when all else hangs."""


def a_worker_in_its_steps(night: Night, **how: Any) -> Worker:
    """A worker that has made some steps of `HELD` jobs."""
    worker = night.worker(**CALM, **how).ready()
    night.wait_until(lambda: len(night.entries("began")) >= min(HELD, len(night.jobs)), "rows in the engine")
    time.sleep(night.rng.uniform(0.05, 0.3))
    return worker


def test_row_07_what_fits_the_grace_time_is_finished(night: Night) -> None:
    """SIGTERM, jobs shorter than the grace time"""
    night.submit(20, steps=60)
    leaving = a_worker_in_its_steps(night, step_s=0.005, grace_s=LONG_GRACE_S)
    begun = {entry.prompt for entry in night.entries("began")}
    leaving.stop()
    views = night.views().values()
    assert not [view for view in views if view.spec.prompt in begun and view.state is not State.succeeded]
    assert all((view.attempts, view.state) == (0, State.queued) for view in views if not view.ended)
    peer = night.worker(**CALM)
    night.wait_ended()
    assert check(night)
    peer.stop()


@pytest.mark.fault_slice
def test_row_08_what_does_not_fit_is_given_back_and_goes_on_where_it_was(night: Night) -> None:
    """SIGTERM, jobs longer than the grace time, with a peer"""
    night.submit(HELD, steps=LONG_STEPS)
    leaving = a_worker_in_its_steps(night, step_s=LONG_STEP_S, grace_s=SHORT_GRACE_S)
    peer = night.worker(step_s=LONG_STEP_S).ready()
    asked = time.monotonic()
    leaving.stop()
    night.wait_until(lambda: len(night.entries("resumed")) == HELD, "rows that go on elsewhere")
    resumed = night.entries("resumed")
    assert all(entry.pid == peer.pid and entry.step > 0 for entry in resumed)
    assert max(entry.at_s for entry in resumed) - asked < SHORT_GRACE_S + SLACK_S
    assert {view.attempts for view in night.views().values()} == {1}  # the peer's own claim, no other
    night.wait_ended()
    assert check(night)
    peer.stop()


@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
def test_row_09_further_signals_change_nothing(night: Night, long: bool) -> None:
    """SIGTERM five times, then SIGINT"""
    steps, step_s, grace_s = (LONG_STEPS, LONG_STEP_S, SHORT_GRACE_S) if long else (60, 0.005, LONG_GRACE_S)
    night.submit(HELD, steps=steps)
    leaving = a_worker_in_its_steps(night, step_s=step_s, grace_s=grace_s)
    leaving.stop(*[signal.SIGTERM] * 5, signal.SIGINT)
    assert "Traceback" not in night.log_text()
    assert all(view.attempts == (1 if view.ended else 0) for view in night.views().values())
    peer = night.worker(step_s=0.001, **CALM).ready()  # before that it may have its probe in the storage
    night.wait_ended()
    assert check(night)
    peer.stop()


@only("production")
@pytest.mark.parametrize("trouble", ["slow_down", "deny", "hang"])
def test_row_10_a_worker_leaves_in_time_although_the_storage_does_not_answer(
    night: Night, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while S3 answers 503, 403 or not at all"""
    with faulty_s3(night.seed) as stub:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", stub.server.endpoint)
        leaving = night.worker(grace_s=SHORT_GRACE_S, **CALM).ready()
        getattr(stub, trouble)()
        night.submit(12, steps=4)
        night.wait_until(lambda: len(night.entries("drawn")) >= HELD, "pictures that cannot be stored")
        leaving.stop()
        assert not night.client.counts()[State.running]
        assert {view.attempts for view in night.views().values()} == {0}
        stub.heal()
        peer = night.worker(**CALM)
        night.wait_ended()
        assert check(night, duplicates=12)
        peer.stop()


def test_row_10_a_worker_leaves_in_time_although_its_uploads_hang(night: Night) -> None:
    """SIGTERM while every upload hangs"""
    night.submit(12, steps=4)
    leaving = night.worker(failpoint="before_upload:hang", grace_s=SHORT_GRACE_S, **CALM).ready()
    night.wait_until(lambda: len(night.entries("drawn")) >= HELD, "pictures that cannot be stored")
    leaving.stop()
    assert not night.client.counts()[State.running]
    assert {view.attempts for view in night.views().values()} == {0}
    peer = night.worker(**CALM)
    night.wait_ended()
    assert check(night, duplicates=12)
    peer.stop()


def test_row_11_jobs_that_had_not_begun_are_not_begun_by_a_leaving_worker(night: Night) -> None:
    """SIGTERM with messages prefetched and not started"""
    night.submit(20, steps=100)
    leaving = night.worker(step_s=0.005, concurrency=2, **CALM).ready()
    night.wait_until(lambda: len(night.entries("began")) >= 2, "rows in the engine")
    time.sleep(night.rng.uniform(0.0, 0.3))
    asked = time.monotonic()
    leaving.stop()
    assert not [entry for entry in night.entries("began") if entry.at_s > asked + 0.5]
    assert len(night.entries("began")) <= 4
    peer = night.worker(**CALM)
    night.wait_ended()
    assert check(night)
    peer.stop()
