"""The bell: a Celery message that holds a job id and nothing else, sent after the commit.

The row is the truth. A bell that is lost, doubled or late harms nothing, so a broker that does not answer is
logged and never raised; the sweeper rings again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol
from uuid import UUID

from celery import Celery

from jobs.redaction import shown_url

log = logging.getLogger(__name__)

TASK = "nightshift.render"


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
        "unacked_restore_throttle": 1,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "retry_on_timeout": True,
    }


def send(app: Celery, job_id: UUID, model: str, priority: int, **options: Any) -> None:
    """Ring for one job. In kombu's Redis transport 0 is the most urgent. Raises what the broker raises."""
    app.send_task(
        TASK,
        [str(job_id)],
        queue=queue_name(model),
        priority=9 - priority,
        ignore_result=True,
        retry_policy={"max_retries": 1, "interval_start": 0.1},
        **options,
    )


class Bell:
    """The producer's bell. With `memory://` it never rings: that broker lives inside the worker, which looks itself."""

    def __init__(self, broker_url: str) -> None:
        self._broker_url = broker_url
        self.rings = not broker_url.startswith("memory:")
        self._app = Celery("nightshift-producer", broker=broker_url, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            accept_content=["json"],
            result_backend=None,
            broker_connection_timeout=5,
            broker_transport_options=dict(transport_options(broker_url)),
        )

    def ring(self, jobs: Iterable[Rung]) -> int:
        """Ring for each job, up to the first that the broker refuses; how many rang."""
        rung = 0
        if not self.rings:
            return rung
        try:
            with self._app.producer_or_acquire() as producer:
                for job in jobs:
                    send(self._app, job.id, job.model, job.priority, producer=producer)
                    rung += 1
        except Exception as error:  # redis', kombu's and the socket's own kinds; none of them may undo a commit
            log.warning(
                "the broker %s does not answer (%s); the jobs are stored and the workers' sweeper will find them",
                shown_url(self._broker_url),
                type(error).__name__,
            )
        return rung

    def close(self) -> None:
        """Close the connections to the broker."""
        self._app.close()
