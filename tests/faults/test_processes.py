"""Rows 1 to 6 and 12: processes that die, or sleep, at the worst moment."""

from __future__ import annotations

import signal
import time
from uuid import uuid4

import pytest

from jobs import State
from jobs.bell import Bell
from jobs.views import Due
from tests.faults.checker import check
from tests.faults.fake_runner import MODEL
from tests.faults.harness import CALM, Guardian, Night

HELD = 8
"""Jobs that a worker holds at once, so the most that one death may let be computed again."""


def ring(night: Night, *jobs: object, times: int = 1) -> None:
    """Bells for these ids, as a broker that delivers again would send them."""
    bell = Bell(night.settings.broker_url)
    for _ in range(times):
        bell.ring(Due(job, MODEL, 0) for job in jobs)  # type: ignore[arg-type]
    bell.close()


@pytest.mark.fault_slice
def test_row_01_a_worker_killed_among_its_steps_loses_nothing(night: Night) -> None:
    """kill -9 of a worker that draws 8 jobs"""
    night.submit(20, steps=40)
    doomed, peer = night.worker(step_s=0.005).ready(), night.worker(step_s=0.005)
    night.wait_running(HELD)
    time.sleep(night.rng.uniform(0.0, 0.2))
    doomed.kill()
    died = time.monotonic()
    night.wait_until(lambda: not doomed.holds(), "their return", doomed.back_within_s())
    assert time.monotonic() - died <= doomed.back_within_s()
    night.wait_ended()
    assert check(night, duplicates=HELD, orphans=HELD)
    peer.stop()


def test_row_01_workers_killed_again_and_again_lose_nothing(night: Night) -> None:
    """kill -9 of a worker every half a second"""
    kills = 5
    night.submit(60, steps=20)
    with Guardian(night, 2, step_s=0.003) as guardian:
        for _ in range(kills):
            time.sleep(night.rng.uniform(0.3, 0.7))
            night.rng.choice(guardian.workers).kill()
        night.wait_ended()
    # A suspect that is drawn alone when we kill its worker has crashed alone, for all that anybody can see.
    assert check(night, duplicates=kills * HELD, orphans=kills * 2 * HELD, charged=night.states())


@pytest.mark.fault_slice
def test_row_02_a_worker_killed_between_upload_and_commit_shows_nothing_twice(night: Night) -> None:
    """kill -9 after the upload, before the commit"""
    doomed = night.worker(failpoint=f"after_upload:kill9@nth={night.rng.randint(1, 8)}").ready()
    night.submit(16, images=night.rng.randint(1, 2))
    assert doomed.wait() == -signal.SIGKILL
    peer = night.worker()
    night.wait_ended()
    images = night.jobs[0].spec.images
    assert check(night, duplicates=2 * HELD * images, orphans=2 * HELD * images)
    # At least that one was computed twice, and only one of the two is shown: what this row is about.
    assert len(night.entries("drawn")) > len(night.jobs) * images
    peer.stop()


@pytest.mark.parametrize("where", ["after_finish_commit", "before_ack"])
def test_row_03_a_job_committed_before_its_worker_died_is_not_drawn_again(night: Night, where: str) -> None:
    """kill -9 after the commit, or before the ack"""
    doomed = night.worker(failpoint=f"{where}:kill9", lease_s=4.0).ready()
    (job,) = night.submit(1)
    assert doomed.wait() == -signal.SIGKILL
    committed = night.client.get(job.id).state is State.succeeded
    peer = night.worker(**CALM, paced_s=1.5).ready()
    ring(night, job.id, times=3)
    night.submit(3)
    night.wait_ended()
    assert committed or where == "before_ack"
    assert check(night, duplicates=0 if committed else 1, orphans=0 if committed else 1)
    peer.stop()


@pytest.mark.parametrize("where", ["after_claim", "before_claim_commit"])
def test_row_04_a_job_claimed_by_a_worker_that_died_at_once_comes_back(night: Night, where: str) -> None:
    """kill -9 between the claim and the engine"""
    doomed = night.worker(failpoint=f"{where}:kill9@nth={night.rng.randint(1, 6)}").ready()
    night.submit(12)
    assert doomed.wait() == -signal.SIGKILL
    peer = night.worker()
    died = time.monotonic()
    night.wait_until(lambda: not doomed.holds(), "their return", doomed.back_within_s())
    assert time.monotonic() - died <= doomed.back_within_s()
    night.wait_ended()
    assert check(night, duplicates=HELD, orphans=HELD)
    peer.stop()


@pytest.mark.fault_slice
def test_row_05_jobs_of_a_producer_that_died_before_it_rang_are_drawn_once(night: Night) -> None:
    """kill -9 of a producer between its commit and its bells"""
    worker = night.worker(lease_s=4.0).ready()
    producer = night.fork("producer", failpoint="after_insert_commit:kill9", specs=night.specs(6), batch="night")
    assert producer.wait() == -signal.SIGKILL
    assert len(night.adopt()) == 6
    night.wait_ended()
    assert check(night, broker=True)
    worker.stop()


@pytest.mark.parametrize("end", ["raise", "kill9"])
def test_row_06_a_submit_that_was_rolled_back_leaves_no_ghost(night: Night, end: str) -> None:
    """a producer's transaction that is rolled back; bells for ids that nobody knows"""
    worker = night.worker(**CALM).ready()
    producer = night.fork("producer", failpoint=f"before_insert_commit:{end}", specs=night.specs(6), batch="night")
    assert producer.wait() != 0
    assert not night.adopt()
    ring(night, *(uuid4() for _ in range(10)))
    night.submit(4)
    night.wait_ended()
    assert len(night.client.jobs()) == 4
    assert check(night, broker=True)
    worker.stop()


@pytest.mark.fault_slice
def test_row_12_a_worker_that_slept_past_its_leases_drops_them_and_goes_on(night: Night) -> None:
    """SIGSTOP beyond the lease, with a peer, and SIGCONT"""
    night.submit(16, steps=30)
    sleeper = night.worker(step_s=0.005).ready()
    night.wait_running(HELD)
    time.sleep(night.rng.uniform(0.0, 0.15))
    sleeper.put_to_sleep()
    peer = night.worker(step_s=0.005)
    night.wait_until(lambda: not sleeper.holds(), "their return", sleeper.back_within_s())
    time.sleep(night.rng.uniform(0.0, 0.5))
    sleeper.kill(signal.SIGCONT)
    night.wait_ended()
    night.submit(8)
    night.wait_ended()
    sleeper.stop()
    peer.stop()
    # The woken worker deleted what it had stored under leases that it had lost.
    assert check(night, duplicates=HELD)


def test_row_12_jobs_of_a_worker_that_only_slept_are_no_suspects_for_long(night: Night) -> None:
    """SIGSTOP beyond the lease, with nobody else there, and SIGCONT"""
    night.submit(HELD, steps=60)
    sleeper = night.worker(step_s=0.005).ready()
    ids = night.wait_running(HELD)
    sleeper.put_to_sleep()
    time.sleep(sleeper.options["lease_s"] + 0.1)
    assert night.store.sweep().requeued == HELD
    assert all(view.suspect for view in night.client.jobs(ids=ids))
    sleeper.kill(signal.SIGCONT)
    night.wait_ended()
    # It may have taken one or two of them alone before it had vouched for them; that delays, and harms nothing.
    assert sum(view.suspect for view in night.client.jobs(ids=ids)) <= HELD // 2
    sleeper.stop()
    assert check(night, duplicates=HELD)


def test_row_12_a_worker_that_sleeps_again_and_again_never_shows_a_job_twice(night: Night) -> None:
    """SIGSTOP at any moment, for any time"""
    night.submit(40, steps=20)
    workers = [night.worker(step_s=0.004).ready() for _ in range(2)]
    sleeps = 0
    while sleeps < 8 and not night.all_ended():
        worker = night.rng.choice(workers)
        worker.kill(signal.SIGSTOP)
        time.sleep(night.rng.uniform(0.0, 2.2))
        worker.kill(signal.SIGCONT)
        sleeps += 1
        time.sleep(night.rng.uniform(0.1, 0.6))
    night.wait_ended()
    for worker in workers:
        worker.stop()
    # One that slept while it drew a suspect alone is counted as a crash, unless it vouches before a peer takes the job.
    assert check(night, duplicates=2 * sleeps * HELD, charged=night.states())
