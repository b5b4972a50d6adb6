"""The bell, on a real Redis: an id and nothing else, the urgent first, and never a reason to fail."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery

from jobs import Client, Settings, State
from jobs.bell import ANSWER_S, AT_ONCE, REST_TIMES, TASK, Bell, queue_name, transport_options
from jobs.views import Due
from tests.servers import free_port


@pytest.fixture
def with_redis(tmp_path: Path, redis_url: str) -> Settings:
    return Settings(home=tmp_path / "nightshift", broker_url=redis_url)


def heard(url: str, model: str, count: int) -> list[dict[str, object]]:
    """The messages that a consumer of this model's queue gets, in its order."""
    app = Celery("listener", broker=url, set_as_current=False)
    app.conf.broker_transport_options = dict(transport_options(url))
    messages: list[dict[str, object]] = []
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue(queue_name(model))
        for _ in range(count):
            message = queue.get(timeout=10)
            messages.append({"task": message.headers["task"], "body": message.payload, "text": message.body})
            message.ack()
        with pytest.raises(Empty):
            queue.get_nowait()
        queue.close()
    app.close()
    return messages


def test_the_message_holds_the_id_and_nothing_else(with_redis: Settings) -> None:
    with Client(with_redis) as client:
        job = client.submit("a secret prompt")
    (message,) = heard(with_redis.broker_url, "nightshift-mini", 1)
    assert message["task"] == TASK
    args, kwargs, _ = json.loads(json.dumps(message["body"]))
    assert (args, kwargs) == ([str(job.id)], {})
    assert "secret" not in str(message["text"])


def test_each_model_has_its_queue_and_the_urgent_come_first(with_redis: Settings) -> None:
    with Client(with_redis) as client:
        plain = client.submit("a")
        urgent = client.submit("b", priority=9)
        other = client.submit("c", model="other")
    ids = [message["body"][0][0] for message in heard(with_redis.broker_url, "nightshift-mini", 2)]  # type: ignore[index]
    assert ids == [str(urgent.id), str(plain.id)]
    (message,) = heard(with_redis.broker_url, "other", 1)
    assert message["body"][0] == [str(other.id)]  # type: ignore[index]


def test_a_rung_job_is_not_rung_again_by_the_sweeper_at_once(with_redis: Settings) -> None:
    with Client(with_redis) as client:
        client.submit("a")
        assert client._store.due(5, older_than_s=60) == []


def test_a_broker_that_is_not_there_does_not_lose_the_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://:geheim@127.0.0.1:{free_port()}/0"
    with caplog.at_level(logging.WARNING), Client(Settings(home=tmp_path / "home", broker_url=url)) as client:
        job = client.submit("a")
        assert client.get(job.id).state == State.queued
    assert "does not answer" in caplog.text
    assert "geheim" not in caplog.text


def due(count: int, model: str = "m", priority: int = 0) -> list[Due]:
    return [Due(uuid4(), model, priority) for _ in range(count)]


@pytest.fixture
def bell(redis_url: str) -> Iterator[Bell]:
    bell = Bell(redis_url)
    yield bell
    bell.close()


def test_bells_that_wait_are_counted_whatever_their_priority(bell: Bell) -> None:
    assert bell.waiting(["m", "other"]) == 0
    bell.ring([*due(3), *due(2, priority=9), *due(1, "other"), *due(4, "third")])
    assert (bell.waiting(["m", "other"]), bell.waiting(["third"])) == (6, 4)


def test_urgent_bells_that_wait_are_counted_alone(bell: Bell) -> None:
    assert bell.urgent_waiting(["m", "other"]) == 0
    bell.ring([due(1, priority=priority)[0] for priority in range(10)])
    bell.ring([*due(2, "other", 9), *due(1, "third", 9)])
    assert bell.urgent_waiting(["m", "other"]) == len({7, 8, 9}) + 2


def test_a_bell_rung_right_after_the_broker_was_emptied_is_in_the_queue(bell: Bell, redis_url: str) -> None:
    assert bell.ring(due(2)) == 2  # queues and their bindings are declared now
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert bell.ring(due(1)) == 1
    assert bell.waiting(["m"]) == 1
    assert len(heard(redis_url, "m", 1)) == 1


def test_a_full_broker_fails_no_submit_and_rings_again_once_there_is_room(with_redis: Settings) -> None:
    with Client(with_redis) as client, redis.Redis.from_url(with_redis.broker_url) as server:
        server.config_set("maxmemory", 1)
        try:
            job = client.submit("a")
        finally:
            server.config_set("maxmemory", 0)
        assert client.get(job.id).state == State.queued
        client.submit("b")
    heard(with_redis.broker_url, "nightshift-mini", 1)


def test_a_broker_that_swallows_everything_is_waited_for_once_and_not_by_each_submit(redis_url: str) -> None:
    later = 0.0
    patient = Bell(redis_url, clock=lambda: time.monotonic() + later)
    with redis.Redis.from_url(redis_url) as client:
        pid = client.info()["process_id"]
    waits: list[float] = []
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            began = time.monotonic()
            assert patient.ring(due(5)) == 0
            waits.append(time.monotonic() - began)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert waits[0] >= ANSWER_S > sum(waits[1:])
    later = REST_TIMES * waits[0]
    assert patient.ring(due(1)) == 1
    patient.close()


def test_the_embedded_bell_is_silent(settings: Settings) -> None:
    bell = Bell("memory://")
    assert not bell.rings
    with Client(settings) as client:
        view = client.submit("a")
    assert bell.ring([Due(view.id, "nightshift-mini", 0)]) == 0
    bell.close()


def raw(url: str, model: str) -> list[dict[str, Any]]:
    """The envelopes in the broker, as they lie there; the first to be heard comes first."""
    with redis.Redis.from_url(url) as client:
        (name,) = [key for key in client.keys(f"*{queue_name(model)}*") if b"_kombu" not in key]
        return [json.loads(text) for text in reversed(client.lrange(name, 0, -1))]


def without_ids(envelope: Any) -> Any:
    """The envelope with its body opened and every id in it replaced: what is left is the same for all jobs."""
    body = base64.b64decode(envelope["body"]).decode()
    return json.loads(re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "id", json.dumps(envelope | {"body": body})))


def test_an_envelope_that_was_copied_is_the_one_that_celery_writes(bell: Bell, redis_url: str) -> None:
    first, second, third = due(3)
    bell.send(first)
    bell.ring([second, third])
    by_celery, *copies = raw(redis_url, "m")
    for copy, job in zip(copies, (second, third), strict=True):
        assert without_ids(copy) == without_ids(by_celery)
        assert json.loads(base64.b64decode(copy["body"]))[0] == [str(job.id)]
        assert str(job.id) in copy["headers"]["argsrepr"]
        assert copy["headers"]["id"] == copy["headers"]["root_id"] == copy["properties"]["correlation_id"]


def test_a_thousand_bells_come_in_their_order_each_with_ids_of_its_own(bell: Bell, redis_url: str) -> None:
    jobs = due(2 * AT_ONCE + 1)
    assert bell.ring(jobs) == len(jobs)
    envelopes = raw(redis_url, "m")
    assert [json.loads(base64.b64decode(one["body"]))[0][0] for one in envelopes] == [str(job.id) for job in jobs]
    for ids in ([one["headers"]["id"] for one in envelopes], [one["properties"]["delivery_tag"] for one in envelopes]):
        assert len(set(ids)) == len(jobs)


def test_bells_of_many_kinds_each_come_to_their_queue(bell: Bell, redis_url: str) -> None:
    kinds = [Due(uuid4(), model, priority) for _ in range(3) for model in ("m", "other") for priority in (0, 9)]
    assert bell.ring(kinds) == 12
    for model in ("m", "other"):
        ids = [message["body"][0][0] for message in heard(redis_url, model, 6)]  # type: ignore[index]
        ours = [job for job in kinds if job.model == model]
        assert ids == [str(job.id) for job in sorted(ours, key=lambda job: -job.priority)]
