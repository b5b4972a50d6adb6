"""A storage that is slow, refuses, forgets to answer or lies, while the engine must go on: rows 31 to 35."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from jobs.states import State
from tests.faults.checker import check
from tests.faults.harness import SLACK_S, Night
from tests.faults.lanes import Place
from tests.faults.s3_stub import FaultyS3, faulty_s3

#: A worker waits so long for an answer of S3 here, instead of 20 s; and no lease is to run out of itself, however busy
#: the machine is, for what is drawn again is to be drawn because of the fault.
WAITS = {"s3_answer_s": 0.3, "lease_s": 4.0, "beat_s": 0.5}
CONCURRENCY = 8
#: Pictures that a worker keeps while none can be stored: a queue of two for each job at once, and those jobs.
KEPT = 3 * CONCURRENCY


@pytest.fixture
def s3(seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    with faulty_s3(seed) as stub:
        for name, value in stub.server.environment.items():
            monkeypatch.setenv(name, value)
        yield stub


@pytest.fixture
def stored(place: Place, s3: FaultyS3, seed: int, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Night]:
    """A night of the lane whose pictures go to the faulty S3."""
    settings = place.settings.model_copy(update={"storage_url": "s3://nights/night"})
    place = dataclasses.replace(place, settings=settings)
    with Night(place, seed, tmp_path, acks_late=bool(pytestconfig.getoption("--acks-late"))) as begun:
        yield begun


def drawn(night: Night) -> int:
    return len(night.entries("drawn"))


def settled(night: Night, s3: FaultyS3) -> None:
    """All is well again: each job ends, was drawn once, and each picture is stored under one name."""
    s3.heal()
    night.wait_ended()
    for worker in night.alive():
        worker.stop()
    print(check(night, duplicates=0, orphans=0))
    puts = {request.key for request in s3.requests if request.method == "PUT"}
    assert all(sum(str(job.id) in key for key in puts) == 1 for job in night.jobs), night.tail()


def test_row_31_a_storage_that_is_too_busy_half_of_the_time_is_asked_again(stored: Night, s3: FaultyS3) -> None:
    """S3 answers 503 to half of the requests"""
    night = stored
    night.worker(**WAITS).ready()
    s3.slow_down(0.5)
    night.submit(24)
    night.wait_ended()
    assert s3.seen(fault="503") > 5
    settled(night, s3)


def test_row_32_a_storage_that_hangs_does_not_stop_the_engine(stored: Night, s3: FaultyS3) -> None:
    """S3 takes the picture and never answers"""
    night = stored
    night.worker(**WAITS).ready()
    s3.hang()
    first = night.submit(3)
    s3.wait_seen(3, fault="hang")
    later = night.submit(10, steps=30)
    names = {job.spec.prompt for job in later}
    night.wait_until(lambda: names <= {entry.prompt for entry in night.entries("drawn")}, "later pictures")
    night.wait_until(lambda: s3.seen(fault="hang") > 2 * len(first), "pictures sent again")
    assert {view.state for view in night.views().values()} == {State.running}
    settled(night, s3)


@pytest.mark.fault_slice
def test_row_32_a_storage_that_is_away_bounds_what_is_drawn_and_no_lease_is_lost(stored: Night, s3: FaultyS3) -> None:
    """S3 away for several leases: what is kept is bounded, and stored when it is back"""
    night = stored
    faults: tuple[Callable[[FaultyS3], None], ...] = (
        FaultyS3.hang,
        FaultyS3.slow_down,
        FaultyS3.deny,
        FaultyS3.reset_mid_body,
    )
    fault = night.turn(faults)
    worker = night.worker(concurrency=CONCURRENCY, **WAITS).ready()
    fault(s3)
    night.submit(KEPT + 16)
    night.wait_until(lambda: drawn(night) == KEPT, "all the pictures that may be kept")
    time.sleep(1.25 * worker.options["lease_s"])
    assert drawn(night) == KEPT, "it draws what it cannot store"
    assert len(worker.holds()) == KEPT, "it let go of what it has drawn, or claimed what it cannot draw"
    assert {(view.attempts, view.suspect) for view in night.views().values()} == {(1, False), (0, False)}
    settled(night, s3)


def test_row_33_a_picture_stored_under_an_error_is_shown_once(stored: Night, s3: FaultyS3) -> None:
    """S3 answers 500 although it has stored"""
    night = stored
    night.worker(**WAITS).ready()
    s3.fail_after_storing(night.turn((0.6, 1.0)))
    night.submit(24)
    s3.wait_seen(20, fault="500 after storing")
    settled(night, s3)


def test_row_33_a_conflict_is_asked_again(stored: Night, s3: FaultyS3) -> None:
    """S3 answers that somebody else writes there"""
    night = stored
    night.worker(**WAITS).ready()
    s3.conflict(night.turn((409, 412)), 0.5)
    night.submit(16)
    night.wait_ended()
    settled(night, s3)


@pytest.mark.fault_slice
def test_row_34_a_picture_that_was_cut_off_is_never_shown(stored: Night, s3: FaultyS3) -> None:
    """the connection ends in the middle of a picture; half a picture stored and called a success"""
    night = stored
    fault = night.turn((FaultyS3.truncate, FaultyS3.reset_mid_body))
    night.worker(**WAITS).ready()
    fault(s3, 0.5)
    night.submit(24)
    night.wait_ended()
    settled(night, s3)


def test_row_34_an_init_image_that_arrives_cut_off_is_nobodys_fault(stored: Night, s3: FaultyS3) -> None:
    """the connection ends in the middle of an init image, or half of it arrives"""
    night = stored
    source = night.folder / "source.png"
    Image.new("RGB", (64, 64), (200, 40, 90)).save(source)
    night.worker(snooze_s=0.2, **WAITS).ready()
    night.submit(16, init_image=str(source), strength=0.5)
    fault = night.turn((FaultyS3.truncate, FaultyS3.reset_mid_body))
    fault(s3, 0.4, "GET")
    night.wait_ended()
    assert sum(s3.seen("GET", fault=fault) for fault in ("truncate", "reset")) > 1
    settled(night, s3)


def test_row_35_a_storage_that_does_not_let_us_in_costs_no_attempt(stored: Night, s3: FaultyS3) -> None:
    """S3 answers 403, the credentials have expired, for longer than a picture is kept"""
    night = stored
    worker = night.worker(patience_s=0.5, snooze_s=0.5, **WAITS).ready()
    s3.deny("ExpiredToken")
    night.submit(12)
    night.wait_until(lambda: "put off for" in night.log_text(), "a job that is put off")
    time.sleep(night.rng.uniform(0.5, 2.0))
    views = night.views().values()
    assert {view.state for view in views} <= {State.queued, State.running}
    assert not any(view.suspect or view.attempts > 1 for view in views)
    assert any("ExpiredToken" in (view.error or "") for view in views), "nobody can see why they wait"
    alerts = [line for line in night.log_text().splitlines() if " ERROR " in line and "ExpiredToken" in line]
    assert alerts, "nobody was told to see to the credentials"
    s3.heal()
    night.wait_ended(SLACK_S + 10.0)
    worker.stop()
    print(check(night, duplicates=drawn(night) - 12, orphans=0))
