"""A producer whose broker is in trouble: the commit stands, the call returns, the log says so (rows 16, 17 and 19)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping

import pytest

from jobs import Client, State
from jobs.bell import ANSWER_S
from tests.faults.brokers import BELLS, depth, look, proxied, seconds
from tests.faults.harness import SLACK_S, Night
from tests.faults.proxy import TcpProxy

PRODUCTION = pytest.mark.parametrize("lane", ["production"], indirect=True)
#: A connection and an answer may each take their time, once more for what was connected before.
BOUND_S = 4 * ANSWER_S + SLACK_S

TROUBLES: Mapping[str, Callable[[TcpProxy, Night], object]] = {
    "stalls": lambda proxy, _: proxy.stall(),
    "forgets": lambda proxy, _: proxy.forget(),
    "refuses": lambda proxy, _: proxy.refuse(),
    "resets": lambda proxy, _: proxy.cut(),
    "tears": lambda proxy, night: proxy.truncate(night.rng.randrange(1, 40)),
    "crawls": lambda proxy, _: proxy.slow(2 * ANSWER_S),
}


@pytest.fixture
def proxy(night: Night) -> Iterator[TcpProxy]:
    with proxied(night) as started:
        yield started


@pytest.fixture
def producer(night: Night, proxy: TcpProxy) -> Iterator[Client]:
    """A client that reaches the broker through the proxy, and nothing else."""
    url = proxy.in_front(night.settings.broker_url)
    with Client(night.settings.model_copy(update={"broker_url": url})) as client:
        yield client


@PRODUCTION
@pytest.mark.parametrize("connected", [True, False], ids=["while connected", "at its first submit"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_row_16_a_submit_stands_and_returns_whatever_the_broker_does(
    night: Night, proxy: TcpProxy, producer: Client, trouble: str, connected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A producer submits while its broker stalls, refuses, resets, tears or crawls"""
    if connected:
        night.jobs.append(producer.submit("before"))
    TROUBLES[trouble](proxy, night)
    specs = night.specs(night.rng.randrange(1, 30))
    with caplog.at_level(logging.WARNING, "jobs.bell"):
        took_s = seconds(lambda: night.jobs.extend(producer.submit_many(specs, batch="night")))
    assert took_s < BOUND_S
    assert night.client.counts()[State.queued] == len(night.jobs)
    assert len(caplog.records) <= 1, "one sentence for one outage, not one for each job"
    if trouble not in ("forgets", "resets", "tears") or (connected and trouble == "forgets"):
        assert "the jobs are stored" in caplog.text


@PRODUCTION
def test_row_16_a_night_of_submits_is_not_held_up_by_a_broker_that_answers_nothing(
    night: Night, proxy: TcpProxy, producer: Client
) -> None:
    """30 submits, one after the other, into a black hole"""
    proxy.stall()
    assert seconds(lambda: night.jobs.extend(producer.submit(spec) for spec in night.specs(30))) < 2 * BOUND_S
    proxy.pass_all()
    worker = night.worker(**BELLS).ready()
    night.wait_ended()
    worker.stop()


@PRODUCTION
def test_row_16_a_producer_rings_again_when_its_broker_is_back(night: Night, proxy: TcpProxy, producer: Client) -> None:
    """A broker that is back is rung by the next submit"""
    with look(night.settings.broker_url) as client:
        producer.submit("before")
        assert depth(client) == 1
        night.rng.choice([proxy.cut, proxy.refuse])()
        producer.submit("during")
        proxy.pass_all()
        before = depth(client)
        time.sleep(1.0)  # a bell that failed rests for a moment; one that timed out would rest longer
        producer.submit("after")
        assert depth(client) == before + 1
