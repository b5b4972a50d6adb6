"""The bell: a Celery message that holds a job id and nothing else, sent after the commit.

The row is the truth. A bell that is lost, doubled or late harms nothing, so a broker that does not answer is
logged and never raised; the sweeper rings again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any, Protocol
from uuid import UUID

from celery import Celery
from kombu import Producer

from jobs.envelopes import Envelope, Kept, push
from jobs.fields import URGENT_PRIORITY
from jobs.redaction import shown_url, with_checked_certificate

log = logging.getLogger(__name__)

TASK = "nightshift.render"

#: Seconds that a producer or ringer waits for an answer of the broker. Few: a bell is not worth waiting for.
ANSWER_S = 2.0
#: After a ring that took a while and failed, the bell rests for so many times as long: a broker that swallows
#: everything must not hold up each of a night's submits.
REST_TIMES, REST_MOST_S = 5.0, 30.0
#: Bells in one command: many, for each is a round trip; half a megabyte, for the broker has to answer in time.
AT_ONCE = 500
_IMPATIENT = {
    "socket_timeout": ANSWER_S,
    "socket_connect_timeout": ANSWER_S,
    "retry_on_timeout": False,
    # Of kombu's own search for a connection, which has no end otherwise.
    "max_retries": 1,
    "interval_start": 0,
}


class Rung(Protocol):
    """What the bell needs to know of a job."""

    @property
    def id(self) -> UUID: ...
    @property
    def model(self) -> str: ...
    @property
    def priority(self) -> int: ...


def queue_name(model: str) -> str:
    """The queue of one model's jobs."""
    return f"render.{model}"


def transport_options(broker_url: str) -> Mapping[str, Any]:
    """kombu's options for this broker; producer and worker must take the same ones, or they miss each other."""
    if broker_url.startswith("memory:"):
        return {"polling_interval": 0.05}
    return {
        "global_keyprefix": "nightshift:",
        "priority_steps": [0, 3, 6, 9],
        "queue_order_strategy": "priority",
        # Above any render; a second delivery is harmless all the same, for the claim refuses it.
        "visibility_timeout": 600,
        "unacked_restore_interval": 5,
        # One that dies while it restores keeps the others from it for so long; two at once would only ring twice.
        "unacked_mutex_expire": 30,
        "unacked_restore_throttle": 1,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "retry_on_timeout": True,
    }


class Bell:
    """One end of the bell's rope: that of a producer, and that of a worker which rings for rows that were forgotten."""

    def __init__(self, broker_url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        #: With `memory://` a producer never rings: that broker lives inside the worker, which looks itself.
        self.rings = not broker_url.startswith("memory:")
        self._clock, self._rest_until = clock, float("-inf")
        self._shown = shown_url(broker_url)
        # kombu wants a host even where there is none, and warns at every connection without it
        broker = with_checked_certificate(broker_url) if self.rings else "memory://localhost//"
        self._app = Celery("nightshift-bell", broker=broker, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            result_backend=None,
            broker_connection_timeout=ANSWER_S,
            broker_transport_options={**transport_options(broker_url), **_IMPATIENT},
        )
        if self.rings:
            self._app.conf.broker_transport = "jobs.envelopes:RedisTransport"

    def ring(self, jobs: Iterable[Rung]) -> int:
        """Ring for each job, up to the first that the broker refuses; how many rang. Never raises for the broker."""
        rung = 0
        if not self.rings or self._clock() < self._rest_until:
            return rung
        began = self._clock()
        try:
            with self._app.producer_or_acquire() as producer:
                envelopes: dict[tuple[str, int], Envelope] = {}
                for some in _bunches(jobs):
                    began = self._clock()
                    self._push(some, envelopes, producer)
                    rung += len(some)
        except Exception as error:  # redis', kombu's and the socket's own kinds; none of them may undo a commit
            took_s = self._clock() - began
            if took_s >= ANSWER_S / 4:  # a refusal costs nothing, and may be over with the next submit
                self._rest_until = began + took_s + min(REST_MOST_S, REST_TIMES * took_s)
            log.warning(
                "the broker %s does not answer (%s); the jobs are stored and the workers' sweeper will find them",
                self._shown,
                type(error).__name__,
            )
        return rung

    def send(self, job: Rung) -> None:
        """Ring for one job. Raises what the broker raises."""
        with self._app.producer_or_acquire() as producer:
            self._send(job, producer=producer)

    def waiting(self, models: Iterable[str]) -> int:
        """Bells of these models that nobody has taken yet, of whichever priority. Raises what the broker raises."""
        with self._app.connection_or_acquire() as connection:
            channel = connection.default_channel
            return sum(channel.queue_declare(queue=queue_name(model)).message_count for model in models)

    def urgent_waiting(self, models: Iterable[str]) -> int:
        """Bells of urgent jobs of these models that nobody has taken yet: one cheap command a model, for it is asked
        ten times a second. Raises what the broker raises."""
        with self._app.connection_or_acquire() as connection:
            channel: Any = connection.default_channel
            # kombu keeps a list for each step of priorities; the first is just that of the urgent ones.
            lists = [channel._q_for_pri(queue_name(model), _broker_priority(URGENT_PRIORITY)) for model in models]
            with channel.conn_or_acquire() as client:
                return sum(client.llen(name) for name in lists)

    def _push(self, jobs: Sequence[Rung], envelopes: dict[tuple[str, int], Envelope], producer: Producer) -> None:
        """Ring for jobs of one model and priority, at once. `envelopes`: of those that were rung for before."""
        kind = _kind(jobs[0])
        if kind not in envelopes:
            envelopes[kind] = self._envelope(jobs[0], producer)
        push(producer, envelopes[kind], [str(job.id) for job in jobs])

    def _envelope(self, job: Rung, producer: Producer) -> Envelope:
        channel: Any = producer.channel
        kept: list[Kept] = []
        channel.keeps = kept
        try:
            self._send(job, producer=producer)
        finally:
            channel.keeps = None
        return Envelope(kept[0], str(job.id))

    def _send(self, job: Rung, *, producer: Producer) -> None:
        self._app.send_task(
            TASK,
            [str(job.id)],
            # By name alone it goes through the nameless exchange. With a named one kombu would look its bindings up in
            # Redis, and drop the message without a word when they are gone (FLUSHALL).
            queue=queue_name(job.model),
            priority=_broker_priority(job.priority),
            ignore_result=True,
            retry=False,
            producer=producer,
        )

    def close(self) -> None:
        """Close the connections to the broker."""
        self._app.close()


def _broker_priority(priority: int) -> int:
    """In kombu's Redis transport 0 is the most urgent."""
    return 9 - priority


def _bunches(jobs: Iterable[Rung]) -> Iterator[Sequence[Rung]]:
    """Jobs of one model and priority, at most `AT_ONCE` of them, in their order."""
    left = iter(jobs)
    while window := sorted(islice(left, 4 * AT_ONCE), key=_kind):
        for _, alike in groupby(window, key=_kind):
            while some := list(islice(alike, AT_ONCE)):
                yield some


def _kind(job: Rung) -> tuple[str, int]:
    return job.model, -job.priority
