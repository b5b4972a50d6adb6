"""What the broker's rows need beside a night: a Redis that goes and comes back, and a look into any."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast
from urllib.parse import urlsplit

import redis

from jobs.bell import TASK
from tests import servers
from tests.faults.harness import CALM, Night
from tests.faults.proxy import TcpProxy

PREFIX = "nightshift:"
QUEUE = f"{PREFIX}render.nightshift-mini"
UNACKED = f"{PREFIX}unacked"
#: kombu's transport options in scaled time: what a connection took and lost comes back after 2 s, not 600.
#: One that restores, and is cut off meanwhile, keeps all others from it for a time.
SOON_BACK: Mapping[str, Any] = {"visibility_timeout": 2, "unacked_restore_interval": 0.5, "unacked_mutex_expire": 2}
#: Of a worker in these rows: its leases outlast a busy machine, its bells age as in a night of short leases.
BELLS: Mapping[str, Any] = {**CALM, "broker": SOON_BACK, "paced_s": 2.0}
#: After an outage Celery looks for the broker at once, then 2, 4 and 6 s after each look before.
LOOKS_AGAIN_S = 12.0


class OwnRedis:
    """A Redis of one row alone, always on the same port, always empty when it starts."""

    def __init__(self) -> None:
        self._port = servers.free_port()
        self._running = ExitStack()
        self.url = ""
        self.start()

    def start(self) -> None:
        self.url = self._running.enter_context(servers.redis_server(port=self._port))

    def shut_down(self) -> None:
        """`SHUTDOWN NOSAVE`: gone, with all that it held."""
        with look(self.url) as client, contextlib.suppress(redis.ConnectionError):
            client.shutdown(nosave=True)
        self._running.close()

    @property
    def pid(self) -> int:
        with look(self.url) as client:
            return int(cast(Mapping[str, Any], client.info("server"))["process_id"])

    def __enter__(self) -> OwnRedis:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()


def look(broker_url: str) -> redis.Redis:
    """A client of the test's own, past every proxy; close it, or use it in a `with`."""
    return redis.Redis.from_url(broker_url)


def move_to(night: Night, broker_url: str) -> None:
    """Give the night another broker, before anything of it runs."""
    night.settings = night.settings.model_copy(update={"broker_url": broker_url})


def proxied(night: Night) -> TcpProxy:
    """A proxy before the night's broker; `through` tells a worker to use it."""
    return TcpProxy(int(urlsplit(night.settings.broker_url).port or 0))


def through(night: Night, proxy: TcpProxy) -> dict[str, str]:
    """The variable that leads a worker through this proxy."""
    return {"NIGHTSHIFT_BROKER_URL": proxy.in_front(night.settings.broker_url)}


def depth(client: redis.Redis) -> int:
    """Bells that wait in the broker, of whichever priority."""
    return sum(client.llen(key) for key in client.scan_iter(f"{QUEUE}*", _type="list"))


def unacked(client: redis.Redis) -> int:
    """Bells that somebody has heard and not answered."""
    return client.hlen(UNACKED)


def messages(client: redis.Redis) -> list[bytes]:
    """The bells that wait, of the priority that the rows use, as they lie in the broker."""
    return [
        message
        for key in client.scan_iter(f"{QUEUE}*", _type="list")
        for message in cast(list[bytes], client.lrange(key, 0, -1))
    ]


def envelope(body: object, *, content_type: str = "application/json", **headers: object) -> bytes:
    """A message as kombu's Redis transport writes it; a body that is bytes or text is taken as it is."""
    text = body if isinstance(body, bytes | str) else json.dumps(body)
    tag = str(uuid.uuid4())
    return json.dumps(
        {
            "body": text.decode("latin1") if isinstance(text, bytes) else text,
            "content-encoding": "utf-8",
            "content-type": content_type,
            "headers": {"lang": "py", "task": TASK, "id": tag, **headers},
            "properties": {
                "correlation_id": tag,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "render.nightshift-mini"},
                "priority": 0,
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    ).encode()


@contextlib.contextmanager
def again_and_again(act: Callable[[], object], pauses_s: Iterator[float]) -> Iterator[None]:
    """`act` after each pause, in a thread, until the block ends; what it raises fails the test."""
    done, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not done.wait(next(pauses_s)):
                act()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if errors:
        raise errors[0]


def pauses(night: Night, least_s: float, most_s: float) -> Iterator[float]:
    """Random pauses of the night's own."""
    rng = type(night.rng)(night.rng.random())
    while True:
        yield rng.uniform(least_s, most_s)


def seconds(call: Callable[[], object]) -> float:
    """How long the call took."""
    began = time.monotonic()
    call()
    return time.monotonic() - began
