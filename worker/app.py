"""The Celery app of a worker: one task, one queue per model, and a broker that is only a doorbell."""

from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from celery.app import trace
from celery.worker import WorkController
from celery.worker import state as celery_state
from kombu import Queue

from jobs.bell import TASK, queue_name, transport_options
from jobs.redaction import with_checked_certificate
from worker.listening import forget_builtin_tasks


def make_app(broker_url: str, models: Sequence[str], *, concurrency: int, acks_late: bool = True) -> Celery:
    """An app that consumes ``render.<model>`` of each model with ``concurrency`` threads."""
    # kombu wants a host even where there is none, and warns at every connection without it
    broker = with_checked_certificate(broker_url) if broker_url != "memory://" else "memory://localhost//"
    app = Celery("nightshift", broker=broker, set_as_current=False)
    app.conf.update(
        result_backend=None,
        task_ignore_result=True,
        # JSON only: a message of another kind is refused unread.
        task_serializer="json",
        accept_content=["json"],
        result_accept_content=["json"],
        event_serializer="json",
        # Acked when the story has ended: a killed process leaves its bells to others. The row decides all the same,
        # and the fault suite passes either way.
        task_acks_late=acks_late,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=False,
        task_queues=[Queue(queue_name(model)) for model in models],
        worker_concurrency=concurrency,
        worker_prefetch_multiplier=1,  # 0 would mean without limit
        worker_enable_prefetch_count_reduction=False,
        # Threads cannot be ended from outside: drain and cancel are ours (worker.drain, worker.heartbeat).
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_soft_shutdown_timeout=0.0,
        worker_enable_soft_shutdown_on_idle=False,
        worker_enable_remote_control=False,
        worker_consumer="worker.listening:Listener",
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=concurrency + 4,
        broker_transport_options=dict(transport_options(broker_url)),
    )
    if not is_embedded(broker_url):
        app.conf.broker_transport = "worker.listening:RedisTransport"
    forget_builtin_tasks(app)
    return app


def register(app: Celery, story: Callable[[str], None]) -> None:
    """Let ``story`` answer the bell with the message's first argument; whatever else it holds is ignored, and so is
    a message without any (``stop_consuming`` sends those)."""

    def answer(*args: Any, **_: Any) -> None:
        if args:
            story(str(args[0]))

    app.task(name=TASK, ignore_result=True)(answer)


class Consumer(WorkController):
    """Celery's worker without its command line around it: no banner, no signal handlers (``worker.drain`` has them)."""

    def __init__(self, app: Celery, *, on_ready: Callable[[], None]) -> None:
        self._on_ready = on_ready
        super().__init__(
            app=app, pool_cls="threads", without_gossip=True, without_mingle=True, without_heartbeat=True, loglevel=None
        )

    def on_before_init(self, **kwargs: Any) -> None:
        trace.setup_worker_optimizations(self.app)

    def on_consumer_ready(self, consumer: Any) -> None:
        # The event loop has no wake-up of its own: without this tick it would notice `stop` after seconds only.
        timer: Any = self.timer  # the stubs know neither of its two kinds
        timer.call_repeatedly(0.25, _nothing)
        self._on_ready()


def stop_consuming(app: Celery) -> None:
    """Make the ``Consumer`` of this process end after the tasks that run now. From any thread."""
    setattr(celery_state, "should_stop", 0)  # noqa: B010 - typed as None in the stubs
    if is_embedded(str(app.conf.broker_url)):
        # Celery's loop for this transport sleeps up to 2 s before it looks, and once more while it ends.
        for _ in range(2):
            app.send_task(TASK, queue=app.conf.task_queues[0], ignore_result=True)


def is_embedded(broker_url: str) -> bool:
    """Whether the broker lives in this process, so that nobody else can ring."""
    return broker_url.startswith("memory:")


def _nothing() -> None:
    pass
