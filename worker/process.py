"""One worker process, put together: threads, Celery, drain. ``run`` is everything after the command line."""

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import uuid4

from celery import Celery

from jobs.bell import Bell
from jobs.redaction import shown_url
from jobs.settings import Settings
from jobs.store import Store
from worker.app import Consumer, is_embedded, make_app, register, stop_consuming
from worker.delivery import Outside
from worker.drain import Drain, DrainSteps
from worker.engine_thread import EngineThread, Workshop
from worker.heartbeat import Fence, Heartbeat, Voucher
from worker.leases import Leases
from worker.lifeline import Lifeline
from worker.liveness import Liveness, patience_for
from worker.lookout import Lookout
from worker.means import Means
from worker.memory import give_back_freed_memory
from worker.periodic import Periodic
from worker.preflight import Services
from worker.slots import Slots
from worker.solitude import Solitude
from worker.sweeper import Pace, Ringer, Sweeper, pace_for
from worker.tasks import Deps, render
from worker.uploads import Uploads
from worker.watchdog import Watchdog, give_back, step_limit_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """Times in seconds. ``concurrency``: jobs held at once, more than the engine steps together, so that it always
    has candidates. ``until_empty``: leave when no job of our models is queued or running. ``acks_late``: a bell is
    acked when its pictures are drawn, not when it was heard. ``patience_s``: how long finished pictures wait for a
    storage that is away; then their job waits ``snooze_s`` in the queue. ``step_limit_s``: a step that lasts longer
    hangs; None for what suits the device."""

    concurrency: int
    lease_s: float = 30.0
    beat_s: float = 10.0
    poll_s: float = 1.0
    grace_s: float = 25.0
    until_empty: bool = False
    acks_late: bool = True
    patience_s: float = 600.0
    snooze_s: float = 60.0
    step_limit_s: float | None = None


def run(
    services: Services,
    settings: Settings,
    options: Options,
    open_workshop: Callable[[], Workshop],
    lifeline: Lifeline | None = None,
) -> int:
    """Work until told to leave, or until the supervisor at the other end of ``lifeline`` is gone; the exit code. Call
    it in the main thread.

    Raises a ``NightshiftError`` when no model can be loaded or the device is not there.
    """
    try:
        return _Worker(settings, options, services, EngineThread(open_workshop), lifeline).run()
    finally:
        services.store.close()


def worker_name() -> str:
    """``host:pid:uuid``, new at each start: two processes never share leases, whatever their names."""
    return f"{socket.gethostname()[:100]}:{os.getpid()}:{uuid4()}"


class UntilEmpty(Periodic):
    """Asks to leave once nothing is queued or running any more."""

    def __init__(self, store: Store, models: tuple[str, ...], slots: Slots, leave: Callable[[str], None]) -> None:
        super().__init__("until-empty")
        self._store, self._models, self._slots, self._leave = store, models, slots, leave

    def tick(self) -> float:
        if not self._slots.busy() and not self._store.unfinished(self._models):
            self._leave("no work is left")
            self.stop()
        return 0.5


class _Worker:
    def __init__(
        self,
        settings: Settings,
        options: Options,
        services: Services,
        engine: EngineThread,
        lifeline: Lifeline | None,
    ) -> None:
        self._settings, self._options, self._engine, self._lifeline = settings, options, engine, lifeline
        self._store, self._storage = services.store, services.storage
        self._bell, self._embedded = Bell(settings.broker_url), is_embedded(settings.broker_url)
        self._id = worker_name()
        self._leases = Leases(engine.interrupt)
        self._app: Celery | None = None
        self._slots = Slots(options.concurrency, forget_s=self._pace.bell_age_s, clock=time.monotonic)
        self._solitude = Solitude()
        # As many again as are being drawn: a storage that hangs for a moment is not noticed by the engine.
        self._uploads = Uploads(2 * options.concurrency)
        self._drain = Drain(
            DrainSteps(self._admit_nothing, engine.drain, self._stop_consuming, self._release_all),
            grace_s=options.grace_s,
        )

    def run(self) -> int:
        """Everything from the models to the last thread; see ``run`` of this module."""
        self._drain.install_signal_handlers()
        self._drain.start()
        if self._lifeline is not None:
            self._lifeline.tell(lambda: self._drain.request("the supervisor is gone"))
        self._engine.start()
        workshop = self._engine.ready.result()
        give_back_freed_memory()
        self._app = app = self._make_app(workshop)
        deps = self._deps(workshop)
        register(app, lambda job_id: render(job_id, deps))
        lookout = self._lookout(workshop, lambda job_id: render(job_id, deps))
        threads = self._threads(workshop)
        for thread in (lookout, *threads):
            thread.start()
        self._consume(app, workshop)
        lookout.finish()
        self._uploads.join()
        for thread in threads:
            thread.stop()
        self._engine.close()
        self._engine.join(timeout=self._options.grace_s)
        self._drain.left()
        log.info("worker %s left", self._id)
        return 0

    def _consume(self, app: Celery, workshop: Workshop) -> None:
        """Answer bells until the drain begins.

        Celery's consumer ends with an error when a message is no envelope at all (anyone who reaches the broker can
        put one there); that message is gone then, so we begin anew.
        """
        while not self._slots.closed:
            Consumer(app, on_ready=lambda: self._announce(workshop)).start()
            if not self._slots.closed:
                log.error("the consumer ended by itself; starting it again")
                time.sleep(0.2)  # a broker full of garbage must not take a whole core

    def _make_app(self, workshop: Workshop) -> Celery:
        options = self._options
        return make_app(
            self._settings.broker_url, workshop.models, concurrency=options.concurrency, acks_late=options.acks_late
        )

    @property
    def _pace(self) -> Pace:
        return pace_for(self._settings.broker_url, self._options.lease_s)

    def _deps(self, workshop: Workshop) -> Deps:
        return Deps(
            outside=Outside(
                self._store,
                self._storage,
                patience_s=self._options.patience_s,
                snooze_s=self._options.snooze_s,
                png_parameters=self._settings.png_parameters,
            ),
            engine=self._engine,
            leases=self._leases,
            slots=self._slots,
            solitude=self._solitude,
            uploads=self._uploads,
            worker_id=self._id,
            lease_s=self._options.lease_s,
            broken=workshop.broken,
        )

    def _lookout(self, workshop: Workshop, story: Callable[[str], None]) -> Lookout:
        return Lookout(
            self._store,
            self._slots,
            workshop.models,
            story,
            self._pace,
            most=max(1, self._options.concurrency // 4),
            bells=None if self._embedded else lambda: self._bell.urgent_waiting(workshop.models),
            clock=time.monotonic,
        )

    def _threads(self, workshop: Workshop) -> list[Periodic]:
        options, store, bell = self._options, self._store, self._bell

        def waiting() -> int:
            return bell.waiting(workshop.models)

        ringer = Ringer(
            store, bell.send, self._slots, workshop.models, self._pace, waiting=None if self._embedded else waiting
        )
        self._slots.on_free = ringer.freed
        watchdog = Watchdog(
            self._engine,
            options.step_limit_s or step_limit_for(workshop.device),
            lambda: give_back(store, self._leases),
        )
        heartbeat = Heartbeat(
            store,
            self._leases,
            self._id,
            lease_s=options.lease_s,
            beat_s=options.beat_s,
            poll_s=options.poll_s,
            step_moves=watchdog.step_moves,
        )
        liveness = Liveness(
            store,
            self._slots,
            waiting,
            workshop.models,
            patience_s=patience_for(options.lease_s),
            held=self._uploads.inside,
        )
        threads: list[Periodic] = [
            Sweeper(store, self._pace.sweep_s),
            ringer,
            heartbeat,
            Fence(self._leases, lease_s=options.lease_s, look_s=options.poll_s),
            Voucher(store, self._leases, look_s=options.poll_s),
            watchdog,
            liveness,
            Means(self._release_all),
        ]
        if options.until_empty:
            threads.append(UntilEmpty(self._store, workshop.models, self._slots, self._drain.request))
        return threads

    def _announce(self, workshop: Workshop) -> None:
        if self._lifeline is not None:
            self._lifeline.ready()
        log.info(
            "worker %s ready: device %s, models %s, %d jobs at once, database %s, broker %s, storage %s",
            self._id,
            workshop.device,
            ", ".join(f"{name} (broken)" if name in workshop.broken else name for name in workshop.models),
            self._options.concurrency,
            self._store.engines.shown,
            shown_url(self._settings.broker_url),
            shown_url(self._settings.storage_url),
        )

    def _admit_nothing(self) -> None:
        self._slots.close()
        self._solitude.close()

    def _stop_consuming(self) -> None:
        if self._app is not None:  # else the models are still being loaded; `run` looks before it consumes
            stop_consuming(self._app)

    def _release_all(self) -> None:
        self._store.release_all([lease.claim for lease in self._leases.held().values()])
