"""How a worker's end of the broker behaves when the broker is gone."""

from typing import Any

import pytest
from kombu import Connection, Queue

from tests.servers import redis_server
from worker.listening import RedisTransport


def test_a_message_that_could_not_be_acked_takes_no_place_from_others() -> None:
    """Else a consumer whose slots all end during an outage asks for no message again, and never sees the outage."""
    with redis_server() as url:
        connection = Connection(url, transport=RedisTransport)
        channel: Any = connection.channel()  # the stubs know little of it
        queue = Queue("bells")(channel)
        queue.declare()
        connection.Producer(channel).publish({}, routing_key="bells")
        channel.basic_qos(0, 1, False)
        message = queue.get()
        assert message is not None
        assert not channel.qos.can_consume()
    with pytest.raises(connection.connection_errors):
        message.ack()
    assert channel.qos.can_consume()
    connection.collect()
