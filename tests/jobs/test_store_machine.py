"""Any order of what producers, workers, sweepers and people do to jobs: the store and a dict agree at every step."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from uuid import UUID

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from jobs import schema
from jobs.db import db_now, open_engines
from jobs.errors import JobConflict
from jobs.models import MAX_ATTEMPTS, MAX_SOLO_CRASHES, batch, image, job
from jobs.spec import JobSpec
from jobs.states import TERMINAL, TRANSITIONS, State
from jobs.store import Store
from jobs.store_prune import Housekeeper
from jobs.views import Claim, Output, Sweep
from tests.jobs.conftest import make_available

workers = st.sampled_from(["worker-1", "worker-2"])
PAST_S, FUTURE_S = -60.0, 3600.0


@dataclass(eq=False)  # two jobs in the same state are still two
class Model:
    """What the dict knows of one job."""

    state: State = State.queued
    attempts: int = 0
    solo_crashes: int = 0
    suspect: bool = False
    waiting: bool = False  # behind a back-off
    rung: bool = False
    token: UUID | None = None
    worker: str = ""
    expired: bool = False
    wanted: bool = False  # cancel was asked for
    saved_key: str | None = None
    images: int = 0

    def claimable(self, alone: bool) -> bool:
        return self.state == State.queued and not self.waiting and (alone or not self.suspect)

    @property
    def overdue(self) -> bool:
        return self.state == State.running and self.expired

    @property
    def as_row(self) -> tuple[object, ...]:
        return self.state, self.attempts, self.solo_crashes, self.suspect, self.saved_key, self.images

    def __setattr__(self, name: str, value: object) -> None:
        if name == "state":
            before = getattr(self, name, value)
            assert value == before or value in TRANSITIONS[State(str(before))]
        object.__setattr__(self, name, value)

    def to_queue(self, *, waiting: bool, failed: bool = False) -> None:
        """Back into the queue, or to the end that somebody asked for or the job deserved."""
        self.state = State.cancelled if self.wanted else State.failed if failed else State.queued
        self.waiting, self.rung = waiting, False

    def uncharge(self) -> None:
        self.solo_crashes -= self.suspect


class StoreMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    claims = Bundle("claims")  # valid and stale ones alike: a stale one must change nothing

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store
        with store.engines.writer.begin() as connection:
            for table in (image, job, batch):
                connection.execute(sa.delete(table))
        self.model: dict[UUID, Model] = {}
        self.keys: dict[str, UUID] = {}
        self.numbers = itertools.count()

    # Producers and people

    @rule(target=jobs, count=st.integers(1, 3), rung=st.booleans())
    def submit(self, count: int, rung: bool) -> object:
        views = self.store.submit([JobSpec(prompt="x")] * count, rung=rung)
        self.model |= {view.id: Model(rung=rung) for view in views}
        return multiple(*(view.id for view in views))

    @rule(target=jobs, key=st.sampled_from("ab"))
    def submit_with_a_key(self, key: str) -> object:
        (view,) = self.store.submit([JobSpec(prompt="x")], idempotency_keys=[key])
        assert view.id == self.keys.setdefault(key, view.id)
        if view.id in self.model:
            return multiple()
        self.model[view.id] = Model()
        return view.id

    @rule(job_id=jobs)
    def cancel(self, job_id: UUID) -> None:
        model = self.model[job_id]
        if model.state in TERMINAL:
            with pytest.raises(JobConflict):
                self.store.cancel(job_id)
            return
        model.wanted = True
        if model.state == State.queued:
            model.state, model.saved_key = State.cancelled, None
        assert self.store.cancel(job_id) == model.state

    @rule(job_id=jobs)
    def retry(self, job_id: UUID) -> None:
        model = self.model[job_id]
        if model.state != State.failed:
            with pytest.raises(JobConflict):
                self.store.retry(job_id)
            return
        self.store.retry(job_id)
        model.state, model.attempts, model.waiting, model.rung, model.token = State.queued, 0, False, False, None
        model.suspect, model.solo_crashes = model.solo_crashes > 0, 0

    @rule(job_id=jobs)
    def repair(self, job_id: UUID) -> None:
        """A picture that it shows is gone from the storage."""
        model = self.model[job_id]
        with self.store.engines.reader.connect() as connection:
            keys = connection.scalars(sa.select(image.c.key).where(image.c.job_id == job_id)).all()
        queued = Housekeeper(self.store.engines).queue_again(job_id, keys[0] if keys else "no such key", "it is gone")
        assert queued == (model.state == State.succeeded)
        if queued:
            model.state, model.attempts, model.waiting, model.rung, model.token = State.queued, 0, False, False, None
            model.images, model.suspect, model.solo_crashes = 0, model.solo_crashes > 0, 0

    # Workers

    @rule(target=claims, job_id=jobs, worker=workers, alone=st.booleans(), expired=st.booleans())
    def claim(self, job_id: UUID, worker: str, alone: bool, expired: bool) -> object:
        model = self.model[job_id]
        claim = self.store.claim(job_id, worker, lease_s=PAST_S if expired else FUTURE_S, alone=alone)
        assert (claim is not None) == model.claimable(alone)
        if claim is None:
            return multiple()
        model.state, model.token, model.worker, model.expired = State.running, claim.token, worker, expired
        model.attempts += 1
        model.solo_crashes += model.suspect
        assert (claim.attempt, claim.suspect, claim.saved_key) == (model.attempts, model.suspect, model.saved_key)
        return claim

    def held(self, claim: Claim) -> Model | None:
        """The job's model when this very claim holds it."""
        model = self.model[claim.job_id]
        return model if model.state == State.running and model.token == claim.token else None

    @rule(claim=claims)
    def finish(self, claim: Claim) -> None:
        model, held = self.model[claim.job_id], self.held(claim)
        repeated = model.state == State.succeeded and model.token == claim.token
        done = self.store.finish(claim, [Output(0, f"k{next(self.numbers)}", 1, 8, 8, "s", 1)])
        fresh = held is not None and not model.wanted
        assert done == (fresh or repeated)
        if fresh:
            model.uncharge()
            model.state, model.images, model.saved_key = State.succeeded, 1, None

    @rule(claim=claims, retry=st.booleans())
    def fail(self, claim: Claim, retry: bool) -> None:
        model = self.held(claim)
        state = self.store.fail(claim, "boom", retry=retry, traceback="Traceback")
        if model is None:
            assert state is None
            return
        again = retry and model.attempts < MAX_ATTEMPTS
        model.to_queue(waiting=True, failed=not again)
        model.uncharge()
        model.saved_key = model.token = None
        assert state == model.state

    @rule(
        claim=claims,
        snooze=st.booleans(),
        suspect=st.booleans(),
        saved_key=st.none() | st.sampled_from(["saved/a", "saved/b"]),
    )
    def release(self, claim: Claim, snooze: bool, suspect: bool, saved_key: str | None) -> None:
        model = self.held(claim)
        given_back = self.store.release(
            claim, wait_s=FUTURE_S if snooze else 0.0, reason="why", suspect=suspect, saved_key=saved_key
        )
        assert given_back == (model is not None)
        if model is not None:
            self.gave_back(model, waiting=snooze)
            model.suspect = model.suspect or suspect
            model.saved_key = None if model.wanted else saved_key or model.saved_key

    def gave_back(self, model: Model, *, waiting: bool) -> None:
        model.to_queue(waiting=waiting)
        model.uncharge()
        model.attempts -= 1
        model.token = None
        model.saved_key = None if model.wanted else model.saved_key

    @rule(claim=claims)
    def vouch(self, claim: Claim) -> None:
        model, held = self.model[claim.job_id], self.held(claim)
        suspected = model.state == State.queued and model.token == claim.token and model.suspect
        assert self.store.vouch(claim) == (held is not None or suspected)
        if held is not None:
            self.gave_back(held, waiting=False)
        elif suspected:
            model.token = None
            model.solo_crashes -= claim.suspect
            model.suspect = claim.suspect

    @rule(claim=claims)
    def confirm_cancelled(self, claim: Claim) -> None:
        model = self.held(claim)
        confirmed = self.store.confirm_cancelled(claim)
        assert confirmed == (model is not None and model.wanted)
        if model is not None and confirmed:
            model.uncharge()
            model.state, model.saved_key = State.cancelled, None

    @rule(worker=workers, late=st.booleans())
    def heartbeat(self, worker: str, late: bool) -> None:
        tokens = [model.token for model in self.model.values() if model.token is not None]  # others' and ended ones too
        beat = self.store.heartbeat(worker, tokens, lease_s=PAST_S if late else FUTURE_S)
        mine = [each for each in self.model.values() if each.state == State.running and each.worker == worker]
        assert beat.held == {model.token for model in mine if not model.wanted}
        assert beat.cancelled == {model.token for model in mine if model.wanted} == self.store.cancel_requested(worker)
        for model in mine:
            model.expired = late

    # Time passes

    @rule(job_id=jobs)
    def the_lease_runs_out(self, job_id: UUID) -> None:
        self._expire(job.c.id == job_id)
        self.model[job_id].expired = True

    @rule(worker=workers)
    def crash_worker(self, worker: str) -> None:
        self._expire(job.c.worker_id == worker)
        for model in self.model.values():
            model.expired = model.expired or model.worker == worker

    def _expire(self, which: sa.ColumnElement[bool]) -> None:
        running = sa.and_(job.c.state == State.running, which)
        with self.store.engines.writer.begin() as connection:
            connection.execute(sa.update(job).where(running).values(lease_expires_at=db_now(PAST_S)))

    @rule()
    def back_off_ends(self) -> None:
        make_available(self.store)
        for model in self.model.values():
            model.waiting = False

    @rule(target=claims, job_id=jobs, worker=workers, times=st.integers(1, MAX_SOLO_CRASHES + 1))
    def the_job_crashes_workers(self, job_id: UUID, worker: str, times: int) -> object:
        """Single rules find the way to the last solo crash too seldom."""
        self.back_off_ends()
        claims = []
        for _ in range(times):
            claims.append(self.claim(job_id, worker, True, True))
            self.sweep()
        return multiple(*(claim for claim in claims if isinstance(claim, Claim)))

    # The sweeper

    @rule()
    def sweep(self) -> None:
        overdue = [model for model in self.model.values() if model.overdue]
        wanted = [model for model in overdue if model.wanted]
        poison = [m for m in overdue if not m.wanted and m.suspect and m.solo_crashes == MAX_SOLO_CRASHES]
        swept = self.store.sweep()
        assert swept == Sweep(len(overdue) - len(wanted) - len(poison), len(poison), len(wanted))
        for model in overdue:
            model.to_queue(waiting=False, failed=model in poison)
            model.attempts -= 1
            model.saved_key = None if model.wanted or model.suspect else model.saved_key
            model.suspect = True

    @rule(limit=st.integers(1, 5), redeliver=st.booleans())
    def due(self, limit: int, redeliver: bool) -> None:
        ready = {
            id: model
            for id, model in self.model.items()
            if model.state == State.queued and not model.waiting and (redeliver or not model.rung)
        }
        found = {due.id for due in self.store.due(limit, older_than_s=PAST_S if redeliver else FUTURE_S)}
        assert found <= ready.keys()
        assert len(found) == min(limit, len(ready))
        for id in found:
            ready[id].rung = True

    # What must hold at every moment

    @invariant()
    def store_and_model_agree(self) -> None:
        with self.store.engines.reader.connect() as connection:
            rows = connection.execute(sa.select(job)).all()
            pictures = Counter(connection.scalars(sa.select(image.c.job_id)))
        stored = {
            row.id: (row.state, row.attempts, row.solo_crashes, row.suspect, row.saved_key, pictures[row.id])
            for row in rows
        }
        assert stored == {id: model.as_row for id, model in self.model.items()}
        for row in rows:
            assert (row.finished_at is not None) == (row.state in TERMINAL)
            assert (row.lease_expires_at is not None) == (row.state == State.running)

    @invariant()
    def counters_stay_in_their_bounds(self) -> None:
        for model in self.model.values():
            assert 0 <= model.attempts <= MAX_ATTEMPTS
            assert 0 <= model.solo_crashes <= (MAX_SOLO_CRASHES if model.suspect else 0)
            assert model.images == (model.state == State.succeeded)

    @invariant()
    def nothing_waits_that_no_claim_could_ever_take(self) -> None:
        for model in self.model.values():
            assert model.state != State.queued or (model.attempts < MAX_ATTEMPTS and not model.wanted)


def run_machine(database_url: str, *, examples: int, steps: int = 40) -> None:
    """Play that many random games on a fresh database."""
    # A back-off far beyond the length of a test, so that it ends only by the rule for it.
    store = Store(open_engines(database_url), backoff_s=10_000.0)
    schema.upgrade(store.engines)
    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    try:
        # Any callable that makes a machine will do.
        run_state_machine_as_test(lambda: StoreMachine(store), settings=how)  # type: ignore[arg-type]
    finally:
        store.close()


def test_the_store_does_what_the_model_does(database_url: str) -> None:
    run_machine(database_url, examples=8 if database_url.startswith("postgresql") else 40)


def test_what_ended_never_moves_except_by_a_persons_retry_or_repair() -> None:
    assert all(TRANSITIONS[state] <= {State.queued} for state in TERMINAL)
    assert TRANSITIONS[State.cancelled] == frozenset()
