"""Whoever can write into the broker can make noise, no more: no code runs, no job appears, no worker stops."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from jobs import Client, Settings, State
from jobs.bell import TASK, queue_name, transport_options
from tests.integration.processes import PATIENCE_S, fake_worker, has_line, stop, tail, wait_until
from worker.app import make_app

QUEUE = queue_name("nightshift-mini")
KEY = f"nightshift:{QUEUE}"
QUICK = {"lease_s": 3.0, "beat_s": 0.5, "poll_s": 0.2, "concurrency": 4}


@pytest.fixture
def settings(tmp_path: Path, redis_url: str) -> Settings:
    """A broker that anybody can reach; the rest in a folder."""
    settings = Settings(home=tmp_path / "home", broker_url=redis_url)
    settings.make_home()
    return settings


@pytest.fixture
def broker(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.broker_url) as client:
        yield client


class Program:
    """A pickle that would make a folder when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def envelope(body: bytes, content_type: str = "application/json", **headers: object) -> bytes:
    """A message as kombu's Redis transport writes it."""
    named = {"lang": "py", "task": TASK, "id": str(uuid.uuid4()), "root_id": None, "argsrepr": "", "kwargsrepr": ""}
    properties = {
        "correlation_id": str(uuid.uuid4()),
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-encoding": "binary" if "json" not in content_type else "utf-8",
            "content-type": content_type,
            "headers": named | headers,
            "properties": properties,
        }
    ).encode()


def body(*args: object, **embedded: object) -> bytes:
    """The body of a task's message: arguments, and what Celery would do afterwards."""
    return json.dumps(
        [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None} | embedded]
    ).encode()


def drained(broker: redis.Redis) -> bool:
    """Whether no message is left, neither waiting nor taken and never acked."""
    waiting = sum(broker.llen(key) for key in broker.keys("nightshift:render.*"))
    return not waiting and not broker.hlen("nightshift:unacked")


def assert_still_works(settings: Settings, broker: redis.Redis, log: Path, canary: Path) -> None:
    """The worker renders what is submitted now, and holds on to nothing that it was sent before."""
    with Client(settings) as client:
        job = client.submit("a red star", steps=2)
        assert client.wait(job.id, PATIENCE_S).state is State.succeeded, tail(log)
    wait_until(lambda: drained(broker), "an empty broker", log)
    assert not canary.exists()


def test_a_pickle_is_dropped_unread(settings: Settings, broker: redis.Redis, tmp_path: Path) -> None:
    log, canary = tmp_path / "worker.log", tmp_path / "canary"
    kinds = ("application/x-python-serialize", "application/x-yaml", "application/json", "application/data")
    with fake_worker(settings, log, step_s=0.0, **QUICK) as worker:
        wait_until(lambda: worker.poll() is not None or has_line(log, "ready")(), "a worker that is ready", log)
        for data in (pickle.dumps([[Program(canary)], {}, {}]), pickle.dumps(Program(canary))):
            for kind in kinds:
                broker.lpush(KEY, envelope(data, kind))
                broker.lpush(KEY, envelope(zlib.compress(data), kind, compression="application/x-gzip"))
            broker.lpush(KEY, data)
        assert_still_works(settings, broker, log, canary)
        stop(worker, log)
    pickle.loads(pickle.dumps([Program(canary)]))  # noqa: S301 - our own, to see that it would have worked
    assert canary.exists(), "the program does nothing, so that its refusal would show nothing"


def test_only_json_is_accepted_on_either_side() -> None:
    app = make_app("redis://localhost", ["nightshift-mini"], concurrency=1)
    assert list(app.conf.accept_content) == ["json"] == list(app.conf.result_accept_content)
    assert app.conf.task_serializer == app.conf.event_serializer == "json"
    assert app.conf.worker_enable_remote_control is False and app.conf.result_backend is None


def random_messages(count: int, rng: random.Random, canary: Path) -> list[bytes]:
    """Messages of every kind of wrong: no envelope, half of one, unknown tasks, odd ids, odd headers, afterthoughts."""
    follow: dict[str, object] = {"task": TASK, "args": [str(canary)], "kwargs": {}, "options": {}, "subtask_type": None}

    def some_id() -> str:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    kinds: list[Callable[[], bytes]] = [
        lambda: envelope(body(some_id())),
        lambda: envelope(body(rng.choice(["", "../x", "'; DROP TABLE job; --", "\0", "a" * 5000, None, 3, {"a": 1}]))),
        lambda: envelope(body()),
        lambda: envelope(body(some_id(), some_id(), callbacks=[follow], chain=[follow])),
        lambda: envelope(body(some_id(), errbacks=[follow], chord=follow)),
        lambda: envelope(body(some_id()), task=rng.choice(["os.system", "celery.backend_cleanup", "", "x" * 300])),
        lambda: envelope(body(some_id()), task=rng.choice([None, 5, ["a"], {"b": 1}])),
        lambda: envelope(body(some_id()), expires="never", eta="not a time", retries=-4, timelimit=["a", "b"]),
        lambda: envelope(body(some_id()), id=rng.choice([None, 5, "x" * 1000])),
        lambda: envelope(rng.randbytes(rng.randrange(60))),
        lambda: envelope(json.dumps(rng.choice([None, 5, "x", [], {}, [1, 2], [[], [], []]])).encode()),
        lambda: envelope(body(some_id()), rng.choice(["text/plain", "application/data", "x/y", ""])),
        lambda: envelope(body(some_id()), compression=rng.choice(["application/x-gzip", "nothing", 7])),
        lambda: json.dumps(rng.choice([{}, {"body": 3}, {"headers": None}, [], 7, None, "text"])).encode(),
        lambda: rng.randbytes(rng.randrange(1, 60)),
    ]
    return [rng.choice(kinds)() for _ in range(count)]


def test_a_thousand_messages_of_noise_are_dropped_and_the_worker_goes_on(
    settings: Settings, broker: redis.Redis, tmp_path: Path
) -> None:
    log, canary = tmp_path / "worker.log", tmp_path / "canary"
    with fake_worker(settings, log, step_s=0.0, **QUICK) as worker:
        wait_until(lambda: worker.poll() is not None or has_line(log, "ready")(), "a worker that is ready", log)
        broker.lpush(KEY, *random_messages(1000, random.Random(14), canary))
        assert_still_works(settings, broker, log, canary)
        with Client(settings) as client:
            assert sum(client.counts().values()) == 1, "no message makes a job"
        stop(worker, log)
    text = log.read_text()
    assert "ended by itself" not in text and "Connection to broker lost" not in text, "noise interrupts nobody"


def test_nobody_can_command_a_worker_through_the_broker(
    settings: Settings, broker: redis.Redis, tmp_path: Path
) -> None:
    """Celery's remote control would let whoever reaches the broker stop, slow down or empty every worker."""
    log = tmp_path / "worker.log"
    with fake_worker(settings, log, step_s=0.0, **QUICK) as worker:
        wait_until(lambda: worker.poll() is not None or has_line(log, "ready")(), "a worker that is ready", log)
        app = Celery("intruder", broker=settings.broker_url, set_as_current=False)
        for options in (dict(transport_options(settings.broker_url)), {}):
            app.conf.broker_transport_options = options
            for command in ("shutdown", "pool_shrink", "cancel_consumer", "rate_limit"):
                arguments = {"queue": QUEUE, "task_name": TASK, "rate_limit": "1/h", "n": 9}
                app.control.broadcast(command, arguments=arguments)
            assert app.control.ping(timeout=1.0) == []
        app.close()
        assert_still_works(settings, broker, log, tmp_path / "canary")
        assert worker.poll() is None
        assert not [key for key in broker.keys("*pidbox*")]
        stop(worker, log)
