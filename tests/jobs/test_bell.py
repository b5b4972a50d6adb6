"""The bell, on a real Redis: an id and nothing else, the urgent first, and never a reason to fail."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from queue import Empty

import pytest
from celery import Celery

from jobs import Client, Settings, State
from jobs.bell import TASK, Bell, queue_name, transport_options
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


def test_the_embedded_bell_is_silent(settings: Settings) -> None:
    bell = Bell("memory://")
    assert not bell.rings
    with Client(settings) as client:
        view = client.submit("a")
    assert bell.ring([Due(view.id, "nightshift-mini", 0)]) == 0
    bell.close()
