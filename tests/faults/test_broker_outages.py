"""A broker that goes, comes back empty, drops connections, answers nothing, late, or in halves: rows 13 to 17.

The bell alone is struck: jobs that run go on under their leases, so no picture is ever computed twice here.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from jobs.models import job as job_table
from tests.faults.brokers import (
    BELLS,
    LOOKS_AGAIN_S,
    OwnRedis,
    again_and_again,
    look,
    move_to,
    pauses,
    proxied,
    through,
)
from tests.faults.checker import check
from tests.faults.harness import Guardian, Night, Worker
from worker.exit_codes import NOT_CONSUMING, UNAVAILABLE

PRODUCTION = pytest.mark.parametrize("lane", ["production"], indirect=True)


@pytest.fixture
def own_redis(night: Night) -> Iterator[OwnRedis]:
    """A Redis that the row may take down."""
    with OwnRedis() as started:
        move_to(night, started.url)
        yield started


def stop(workers: list[Worker]) -> None:
    """All leave in time and in peace; so none of them had to be started again."""
    for worker in workers:
        worker.stop()


def lease_ends(night: Night) -> datetime:
    """When the first of the leases ends; the end of time when none is held."""
    held = sa.select(sa.func.min(job_table.c.lease_expires_at))
    with night.store.engines.reader.connect() as connection:
        return connection.scalar(held) or datetime.max.replace(tzinfo=UTC)


@PRODUCTION
@pytest.mark.fault_slice
def test_row_13_a_broker_comes_back_empty_and_nothing_is_lost(night: Night, own_redis: OwnRedis) -> None:
    """Redis SHUTDOWN NOSAVE, back empty some seconds later"""
    workers = [night.worker(**BELLS).ready() for _ in range(2)]
    night.submit(night.rng.randrange(10, 30), steps=200)
    night.wait_running(night.rng.randrange(1, 6))
    own_redis.shut_down()
    night.submit(5, prompt="while it is away")
    time.sleep(night.rng.uniform(0.0, 2.0))
    own_redis.start()
    night.submit(5, prompt="after it came back")
    night.wait_ended()
    print(check(night, broker=True))
    stop(workers)


@PRODUCTION
def test_row_14_workers_hear_again_after_many_restarts(night: Night, own_redis: OwnRedis) -> None:
    """Redis restarted 20 times in a row"""
    with Guardian(night, 2, **BELLS, deaf_s=LOOKS_AGAIN_S) as guardian:
        for worker in guardian.workers:
            worker.ready()
        night.submit(30, steps=100)
        for _ in range(20 if night.seed <= 2 else 6):
            time.sleep(night.rng.uniform(0.05, 0.8))
            own_redis.shut_down()
            night.submit(1, prompt="down")
            own_redis.start()
        night.submit(5, prompt="at last")
        night.wait_ended()
    # A process that was started while the broker was down said so.
    assert set(guardian.deaths) <= {NOT_CONSUMING, UNAVAILABLE}
    assert NOT_CONSUMING in guardian.deaths or not guardian.deaths
    print(check(night, broker=True))


@PRODUCTION
def test_row_15_killed_connections_deliver_twice_and_render_once(night: Night, pytestconfig: pytest.Config) -> None:
    """CLIENT KILL TYPE normal, again and again"""
    workers = [night.worker(step_s=0.005, **BELLS).ready() for _ in range(2)]
    night.submit(14, steps=night.rng.randrange(600, 800))  # longer than the bells of lost connections stay away
    night.wait_running(8)
    with look(night.settings.broker_url) as client:
        assert not client.client_list(_type="pubsub"), "nobody listens to what CLIENT KILL TYPE pubsub could strike"

        def kill() -> None:
            client.client_kill_filter(_type="normal", skipme=True)

        kill()
        with again_and_again(kill, pauses(night, 0.2, 0.8)):
            night.wait_ended()
    print(check(night, broker=True))
    if pytestconfig.getoption("--acks-late"):
        assert "not claimed" in night.log_text(), "bells of running jobs came back, or this row proves nothing"
    stop(workers)


@PRODUCTION
def test_row_16_rendering_goes_on_while_the_broker_answers_nothing(night: Night, own_redis: OwnRedis) -> None:
    """Redis is a black hole, without a reset"""
    stopped, reset_after = night.seed % 3 == 0, night.seed % 3 == 1
    with proxied(night) as proxy:
        environment = through(night, proxy)
        workers = [night.worker(environment=environment, step_s=0.005, **BELLS).ready() for _ in range(2)]
        night.submit(6, steps=night.rng.randrange(300, 600))
        night.wait_running(6)
        pid = own_redis.pid
        if stopped:
            os.kill(pid, signal.SIGSTOP)
        else:
            proxy.stall()
        before = lease_ends(night)
        night.wait_until(lambda: lease_ends(night) > before, "leases that the heartbeat extended")
        night.wait_ended()
        if stopped:
            os.kill(pid, signal.SIGCONT)
        if reset_after:
            proxy.cut()
        proxy.pass_all()
        night.submit(6, prompt="afterwards")
        night.wait_ended()
        print(check(night, broker=True))
        stop(workers)


@PRODUCTION
def test_row_16_a_worker_whose_broker_never_answers_again_leaves_and_says_so(night: Night) -> None:
    """Connections to Redis that stay silent for ever"""
    with proxied(night) as proxy:
        environment = through(night, proxy)
        with Guardian(night, 1, environment=environment, **BELLS, deaf_s=2.0) as guardian:
            guardian.workers[0].ready()
            proxy.forget()
            accepted = proxy.accepted
            night.submit(6)
            night.wait_ended()
            print(check(night, broker=True))
        assert set(guardian.deaths) <= {NOT_CONSUMING}
        assert guardian.deaths or proxy.accepted > accepted, "it found a new connection, or a new process did"


@PRODUCTION
def test_row_16_leaving_does_not_wait_for_a_broker_that_hangs(night: Night) -> None:
    """SIGTERM while Redis is a black hole"""
    with proxied(night) as proxy:
        night.submit(4, steps=night.rng.choice([40, 100, 1000]))
        worker = night.worker(environment=through(night, proxy), **BELLS, step_s=0.01).ready()
        night.wait_running(4)
        proxy.stall()
        worker.stop()
        proxy.cut()
        proxy.pass_all()
        other = night.worker(**BELLS).ready()
        night.wait_ended()
        print(check(night, broker=True))
        other.stop()


@PRODUCTION
def test_row_17_a_slow_broker_loses_nothing(night: Night) -> None:
    """Redis answers late: 40 to 200 ms, and 1 s once"""
    with proxied(night) as proxy:
        proxy.slow(0.5 if night.seed == 2 else night.rng.uniform(0.02, 0.1))
        night.submit(3 if night.seed == 2 else 8)
        workers = [night.worker(environment=through(night, proxy), **BELLS) for _ in range(2)]
        night.wait_ended()
        proxy.pass_all()
        print(check(night, broker=True))
        stop(workers)


@PRODUCTION
def test_row_17_truncated_replies_lose_nothing(night: Night) -> None:
    """Redis' replies end in their middle"""
    with proxied(night) as proxy:
        workers = [night.worker(environment=through(night, proxy), **BELLS).ready() for _ in range(2)]
        night.submit(20, steps=200)
        night.wait_running(4)
        for _ in range(6):
            proxy.truncate(night.rng.randrange(1, 300))
            time.sleep(night.rng.uniform(0.05, 0.5))
            proxy.pass_all()
            time.sleep(night.rng.uniform(0.0, 0.2))
        proxy.cut()
        night.submit(5, prompt="afterwards")
        night.wait_ended()
        print(check(night, broker=True))
        stop(workers)
