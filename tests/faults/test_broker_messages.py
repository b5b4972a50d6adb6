"""A broker that forgets, is full, repeats itself, or holds what nobody of ours wrote: rows 18 to 22."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis

from jobs.bell import TASK
from tests.faults.brokers import BELLS, QUEUE, depth, envelope, look, messages
from tests.faults.checker import check
from tests.faults.harness import Night

PRODUCTION = pytest.mark.parametrize("lane", ["production"], indirect=True)


@pytest.fixture
def broker(night: Night) -> Iterator[redis.Redis]:
    """A look into the night's broker, past everybody."""
    with look(night.settings.broker_url) as client:
        yield client


@PRODUCTION
@pytest.mark.fault_slice
def test_row_18_a_flushed_broker_loses_no_job(night: Night, broker: redis.Redis) -> None:
    """FLUSHALL with many queued and 8 running"""
    workers = [night.worker(**BELLS).ready() for _ in range(2)]
    night.submit(500 if night.seed == 2 else 40, steps=night.rng.randrange(50, 150))
    running = night.wait_running(8)
    broker.flushall()
    ended = night.wait_ended()
    assert all(ended[id].attempts == 1 for id in running)
    print(check(night, broker=True))
    for worker in workers:
        worker.stop()


@PRODUCTION
def test_row_18_no_bell_is_dropped_without_a_word_because_bindings_are_gone(night: Night, broker: redis.Redis) -> None:
    """FLUSHALL between two submits of one producer"""
    night.submit(3)
    assert depth(broker) == 3
    broker.flushall()
    night.submit(4)
    assert depth(broker) == 4, "kombu drops what it finds no binding for"
    worker = night.worker(**BELLS).ready()
    night.wait_ended()
    print(check(night, broker=True))
    worker.stop()


@PRODUCTION
def test_row_19_a_full_broker_fails_no_submit(
    night: Night, broker: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Redis is out of memory for writes"""
    worker = night.worker(**BELLS).ready()
    try:
        broker.config_set("maxmemory", "1")
        with caplog.at_level(logging.WARNING, "jobs.bell"):
            night.submit(night.rng.randrange(1, 20))
        assert "the jobs are stored" in caplog.text
        time.sleep(night.rng.uniform(0.0, 1.0))
    finally:
        broker.config_set("maxmemory", "0")
    night.wait_ended()
    print(check(night, broker=True))
    worker.stop()


@PRODUCTION
def test_row_20_jobs_longer_than_the_visibility_timeout_are_drawn_once(
    night: Night, broker: redis.Redis, pytestconfig: pytest.Config
) -> None:
    """visibility_timeout 1 s, jobs of 4 s"""
    night.submit(8, steps=night.rng.randrange(300, 500))
    impatient = {"visibility_timeout": 1, "unacked_restore_interval": 0.3}
    workers = [night.worker(**{**BELLS, "broker": impatient}, step_s=0.01).ready() for _ in range(2)]
    night.wait_ended()
    print(check(night, broker=True))
    if pytestconfig.getoption("--acks-late"):
        assert "not claimed" in night.log_text(), "bells came back while their jobs ran, or this row proves nothing"
    for worker in workers:
        worker.stop()


@PRODUCTION
def test_row_21_five_bells_for_each_job_in_any_order_draw_it_once(night: Night, broker: redis.Redis) -> None:
    """Each message five times, shuffled"""
    night.submit(20, steps=night.rng.randrange(1, 100))
    copies = 5 * messages(broker)
    assert len(copies) == 5 * 20
    night.rng.shuffle(copies)
    with broker.pipeline() as pipeline:
        pipeline.flushall()
        for copy in copies:
            # Half of them as a second producer's: with a delivery tag of their own.
            pipeline.lpush(QUEUE, copy if night.rng.random() < 0.5 else retagged(copy))
        pipeline.execute()
    workers = [night.worker(**BELLS).ready() for _ in range(2)]
    night.wait_ended()
    print(check(night, broker=True))
    for worker in workers:
        worker.stop()


def retagged(message: bytes) -> bytes:
    fields = json.loads(message)
    fields["properties"]["delivery_tag"] = str(uuid4())
    return json.dumps(fields).encode()


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def rubbish(night: Night, canary: Path) -> list[bytes]:
    """What a stranger, an older Celery, or a later version of ours may put into the queue."""
    pickled = pickle.dumps([[str(uuid4())], {}, Canary(canary)])
    unknown = str(uuid4())
    whole = [
        envelope(base64.b64encode(pickled), content_type="application/x-python-serialize"),
        envelope(pickled, content_type="application/x-python-serialize"),
        envelope([[unknown], {}, None], task="os.system"),
        envelope([["rm -rf /"], {}, None], task="celery.backend_cleanup"),
        # The first protocol: all in the body, no headers.
        without_headers(envelope({"task": TASK, "id": unknown, "args": [unknown], "kwargs": {}})),
        without_headers(envelope({"task": "another", "id": unknown, "args": [], "kwargs": {}})),
        # Ours: no job, no id, and what a later version may send along.
        envelope([[unknown], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]),
        envelope([["../../etc/passwd"], {}, None]),
        envelope([[{"id": unknown}], {}, None]),
        envelope([[], {}, None]),
        envelope([[unknown, 2, "three"], {"hint": "urgent"}, None], nightshift=9),
        envelope([[None], {}, None]),
        envelope([["x" * 100_000], {}, None]),
        envelope("null"),
        envelope("[]"),
        envelope("[[1"),
        envelope({"a": 1}),
        envelope([[unknown], {}, None], eta="yesterday", expires="never", timelimit="none"),
        envelope([[unknown], {}, None], retries="many", argsrepr=3, root_id={}),
    ]
    torn = [b"", b"no json", b"\x80\x04\x95", b"[]", b"{}", b'{"body": 3}', b'{"properties": {}}', whole[0][:-20]]
    rest = [night.rng.choice([night.rng.randbytes(50), json.dumps(night.rng.random()).encode()]) for _ in range(4)]
    return [*whole, *torn, *rest]


def without_headers(message: bytes) -> bytes:
    return json.dumps(json.loads(message) | {"headers": {}}).encode()


@PRODUCTION
@pytest.mark.fault_slice
def test_row_22_whatever_else_lies_in_the_queue_is_dropped(night: Night, broker: redis.Redis) -> None:
    """Garbage, pickles, unknown tasks, old and later protocols"""
    canary = night.folder / "canary"
    worker = night.worker(**BELLS).ready()
    strange = rubbish(night, canary)
    night.rng.shuffle(strange)
    for number, message in enumerate(strange):
        broker.lpush(QUEUE, message)
        if number % 8 == 0:
            night.submit(1)
    night.wait_ended()
    print(check(night, broker=True))
    assert not canary.exists(), "a pickle was opened"
    worker.stop()


@PRODUCTION
def test_row_22_bells_of_a_later_version_ring_for_its_jobs(night: Night, broker: redis.Redis) -> None:
    """Messages of a later version, with more in them"""
    (job,) = night.submit(1)
    broker.flushall()
    broker.lpush(QUEUE, envelope([[str(job.id), {"hint": 1}], {"deadline": "soon"}, None], nightshift=2))
    worker = night.worker(lease_s=60.0, beat_s=20.0).ready()  # no ringer repairs it within the row's time
    night.wait_ended(timeout=10.0)
    print(check(night, broker=True))
    worker.stop()
