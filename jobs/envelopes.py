"""Bells by the thousand: Celery writes one envelope, and the others are copies of it with other ids.

To make a message takes Celery and kombu a quarter of a millisecond, longer than the row takes from the file into the
database, and each is a round trip to the broker. So a channel of ours keeps the message that Celery would have sent,
and a copy for each job goes to the broker with hundreds of others, in one command.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from uuid import uuid4

import redis
from kombu import Producer
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps

#: Bytes of one write to the broker. Each has the whole patience of the connection, and a slow line needs it.
PIECE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Kept:
    """A message that was not sent: the list of Redis that it belongs into, and its text."""

    list: str
    text: str


class _InLargePieces:
    """A connection that does not cut a long command into hundreds of writes, each of which wakes the broker."""

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """As redis-py's."""
        whole = memoryview(b"".join(command))
        pieces = [whole[start : start + PIECE] for start in range(0, len(whole), PIECE)]
        super().send_packed_command(pieces, check_health)  # type: ignore[misc] # of the class that it is mixed into


class RedisConnection(_InLargePieces, redis.Connection):
    """Over TCP."""


class RedisSSLConnection(_InLargePieces, redis.SSLConnection):
    """Over TLS."""


class RedisChannel(kombu_redis.Channel):
    """A channel that can keep a message instead of sending it."""

    connection_class = RedisConnection
    connection_class_ssl = RedisSSLConnection
    keeps: list[Kept] | None = None

    def _put(self, queue: str, message: Any, **options: Any) -> None:
        if self.keeps is None:
            super()._put(queue, message, **options)
            return
        priority = self._get_message_priority(message, reverse=False)
        name = self._q_for_pri(queue, priority)  # type: ignore[attr-defined] # the stubs have not all private names
        self.keeps.append(Kept(name, dumps(message)))


class RedisTransport(kombu_redis.Transport):
    """kombu's own with that channel."""

    Channel = RedisChannel


class Envelope:
    """What Celery wrote for one job, to be copied for others of the same queue and priority."""

    def __init__(self, kept: Kept, job_id: str) -> None:
        message = json.loads(kept.text)
        self.list = kept.list
        self._body = base64.b64decode(message["body"]).split(job_id.encode())
        self._text = (
            kept.text.replace("%", "%%")
            .replace(message["body"], "%(body)s")
            # The broker keeps what is not acked by the tag, Celery what runs by the task's id.
            .replace(message["properties"]["delivery_tag"], "%(own)s")
            .replace(message["headers"]["id"], "%(own)s")
            .replace(job_id, "%(job)s")
            .encode()
        )
        self._stem, self._numbers = str(uuid4())[:-12], count()

    def copy(self, job_id: str) -> bytes:
        """The message for another job, with an id of its own."""
        job, own = job_id.encode(), f"{self._stem}{next(self._numbers):012x}".encode()
        body = binascii.b2a_base64(job.join(self._body), newline=False)
        return self._text % {b"job": job, b"body": body, b"own": own}


def push(producer: Producer, envelope: Envelope, job_ids: Sequence[str]) -> None:
    """Send the messages of these jobs, in this order, in one command. Raises what the broker raises."""
    channel: Any = producer.channel
    with channel.conn_or_acquire() as client:
        client.lpush(envelope.list, *(envelope.copy(job_id) for job_id in job_ids))
