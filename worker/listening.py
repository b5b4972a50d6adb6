"""How a worker hears the broker when others write there too: what is no bell is dropped, and nothing ends by it.

As they come, kombu's consumer and Celery's end at a message that they did not foresee (no JSON, an envelope without its
parts, a task whose name is a list), give back what they hold, and meet the same message again: one would stop a worker.
"""

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown
from kombu.transport import redis, virtual

log = logging.getLogger(__name__)

#: Seconds between two attempts to reach a broker that is away.
LONGEST_WAIT_S = 5


class RedisQoS(redis.QoS):
    """Counts a message as answered even if the broker could not be told.

    kombu's own keeps it then: after an outage in which all slots answered, the consumer holds as many messages as it
    may for ever, asks for none, and so never notices that its connection is gone.
    """

    def ack(self, delivery_tag: str) -> None:
        """As kombu's."""
        try:
            super().ack(delivery_tag)
        except BaseException:
            virtual.QoS.ack(self, delivery_tag)
            raise


class RedisChannel(redis.Channel):
    """A channel that survives an entry of its list which is no JSON; by then it is taken off the list."""

    QoS = RedisQoS

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc] # the stubs have no private names
        except ValueError as error:  # no UTF-8, no JSON
            return _dropped(error)


class RedisTransport(redis.Transport):
    """A transport that survives JSON which is no envelope; nobody took it over, so nobody has to ack it."""

    Channel = RedisChannel

    def _deliver(self, message: Any, queue: Any) -> None:
        try:
            super()._deliver(message, queue)
        # kombu counts KeyError among the signs of a lost connection; here it is a part that the envelope lacks.
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            _dropped(error)


class Listener(Consumer):
    """A consumer that survives an envelope which is no task of ours, and acks it."""

    connection_errors: tuple[type[Exception], ...]  # the stubs lack them
    channel_errors: tuple[type[Exception], ...]

    def ensure_connected(self, conn: Any) -> Any:
        """Try until the broker answers. Celery's own waits half a minute between two attempts after a long outage."""

        def tell(error: Exception, wait_s: float) -> None:
            log.warning("the broker does not answer (%s); trying again in %.0f s", error, wait_s)

        conn.ensure_connection(tell, None, 1, 1, LONGEST_WAIT_S, callback=maybe_shutdown)
        self.first_connection_attempt = False
        return conn

    def create_task_handler(self, *arguments: Any, **options: Any) -> Callable[[Any], None]:
        """Celery's own handler, guarded."""
        handle: Callable[[Any], None] = super().create_task_handler(*arguments, **options)

        def guarded(message: Any) -> None:
            try:
                handle(message)
            except (*self.connection_errors, *self.channel_errors):
                raise
            except Exception as error:  # headers and bodies may hold anything
                _dropped(error)
                if not message.acknowledged:
                    message.ack_log_error(log, self.connection_errors)

        return guarded


def forget_builtin_tasks(app: Celery) -> None:
    """Take away the tasks that Celery brings (`celery.map`, `celery.backend_cleanup`, ...): a worker has one task."""
    app.finalize()
    for name in [name for name in app.tasks if name.startswith("celery.")]:
        app.tasks.unregister(name)


def _dropped(error: Exception) -> bool:
    log.warning("message dropped: it is no bell of ours (%s)", type(error).__name__)
    return True
