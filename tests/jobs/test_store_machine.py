"""Any order of submit, claim, beat, finish, fail, cancel, retry and sweep: the store and a dict agree at every step."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from jobs import schema
from jobs.errors import JobConflict
from jobs.models import MAX_ATTEMPTS
from jobs.spec import JobSpec
from jobs.states import TERMINAL, TRANSITIONS, State
from jobs.store import Store
from jobs.views import Claim, Output, Sweep
from tests.jobs.conftest import make_available

WORKER = "worker-1"


@dataclass(eq=False)  # two jobs in the same state are still two
class Model:
    """What the dict knows of one job."""

    state: State = State.queued
    attempts: int = 0
    waiting: bool = False  # behind a back-off
    token: UUID | None = None
    expired: bool = False
    wanted: bool = False  # cancel was asked for
    images: int = 0

    @property
    def claimable(self) -> bool:
        free = self.state == State.queued and not self.waiting
        return (free or self.overdue) and self.attempts < MAX_ATTEMPTS and not self.wanted

    @property
    def overdue(self) -> bool:
        return self.state == State.running and self.expired


class StoreMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    claims = Bundle("claims")  # valid and stale ones alike: a stale one must change nothing

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="nightshift-machine-")
        # A back-off far beyond the length of a test, so that it ends only by the rule for it.
        self.store = Store(Store.open(f"sqlite:///{Path(self.folder.name) / 'jobs.db'}").engines, backoff_s=10_000.0)
        schema.upgrade(self.store.engines)
        self.model: dict[UUID, Model] = {}
        self.numbers = itertools.count()

    def teardown(self) -> None:
        self.store.close()
        self.folder.cleanup()

    @rule(target=jobs, count=st.integers(1, 3))
    def submit(self, count: int) -> object:
        views = self.store.submit([JobSpec(prompt="x")] * count)
        self.model |= {view.id: Model() for view in views}
        return multiple(*(view.id for view in views))

    @rule(target=claims, job_id=jobs, expired=st.booleans())
    def claim(self, job_id: UUID, expired: bool) -> object:
        model = self.model[job_id]
        claim = self.store.claim(job_id, WORKER, lease_s=-1.0 if expired else 3600.0)
        assert (claim is not None) == model.claimable
        if claim is None:
            return multiple()
        model.state, model.token, model.expired = State.running, claim.token, expired
        model.attempts += 1
        assert claim.attempt == model.attempts
        return claim

    def mine(self, claim: Claim) -> bool:
        model = self.model[claim.job_id]
        return model.state == State.running and model.token == claim.token

    @rule(claim=claims)
    def finish(self, claim: Claim) -> None:
        model, valid = self.model[claim.job_id], self.mine(claim)
        repeated = model.state == State.succeeded and model.token == claim.token
        done = self.store.finish(claim, [Output(0, f"k{next(self.numbers)}", 1, 8, 8, "s", 1)])
        assert done == ((valid and not model.wanted) or repeated)
        if done and not repeated:
            model.state, model.images = State.succeeded, 1

    @rule(claim=claims, retry=st.booleans())
    def fail(self, claim: Claim, retry: bool) -> None:
        model, valid = self.model[claim.job_id], self.mine(claim)
        state = self.store.fail(claim, "boom", retry=retry)
        assert (state is not None) == valid
        if state is None:
            return
        again = retry and model.attempts < MAX_ATTEMPTS
        model.state = State.cancelled if model.wanted else State.queued if again else State.failed
        model.waiting = True
        assert state == model.state

    @rule(claim=consumes(claims))
    def release(self, claim: Claim) -> None:
        model, valid = self.model[claim.job_id], self.mine(claim)
        assert self.store.release(claim) == valid
        if valid:
            model.state = State.cancelled if model.wanted else State.queued
            model.waiting = False
            model.attempts -= 1

    @rule(claim=claims)
    def confirm_cancelled(self, claim: Claim) -> None:
        model, valid = self.model[claim.job_id], self.mine(claim)
        assert self.store.confirm_cancelled(claim) == (valid and model.wanted)
        if valid and model.wanted:
            model.state = State.cancelled

    @rule(job_id=jobs)
    def cancel(self, job_id: UUID) -> None:
        model = self.model[job_id]
        if model.state in TERMINAL:
            with pytest.raises(JobConflict):
                self.store.cancel(job_id)
            return
        model.wanted = True
        if model.state == State.queued:
            model.state = State.cancelled
        assert self.store.cancel(job_id) == model.state

    @rule(job_id=jobs)
    def retry(self, job_id: UUID) -> None:
        model = self.model[job_id]
        if model.state != State.failed:
            with pytest.raises(JobConflict):
                self.store.retry(job_id)
            return
        self.store.retry(job_id)
        model.state, model.attempts, model.waiting = State.queued, 0, False

    @rule(expire=st.booleans())
    def heartbeat(self, expire: bool) -> None:
        tokens = [model.token for model in self.model.values() if model.token is not None]
        beat = self.store.heartbeat(WORKER, tokens, lease_s=-1.0 if expire else 3600.0)
        running = [model for model in self.model.values() if model.state == State.running]
        assert beat.held == {model.token for model in running if not model.wanted}
        assert beat.cancelled == {model.token for model in running if model.wanted}
        for model in running:
            model.expired = expire

    @rule()
    def sweep(self) -> None:
        overdue = [model for model in self.model.values() if model.overdue]
        wanted = [model for model in overdue if model.wanted]
        failed = [model for model in overdue if not model.wanted and model.attempts >= MAX_ATTEMPTS]
        swept = self.store.sweep()
        assert swept == Sweep(len(overdue) - len(wanted) - len(failed), len(failed), len(wanted))
        for model in overdue:
            model.state = State.cancelled if model.wanted else State.failed if model in failed else State.queued
            model.waiting = False

    @rule()
    def back_off_ends(self) -> None:
        make_available(self.store)
        for model in self.model.values():
            model.waiting = False

    @rule(limit=st.integers(1, 5))
    def due(self, limit: int) -> None:
        ready = {id for id, model in self.model.items() if model.state == State.queued and not model.waiting}
        found = {due.id for due in self.store.due(limit)}
        assert found <= ready
        assert len(found) == min(limit, len(ready))

    @invariant()
    def store_and_model_agree(self) -> None:
        for view in self.store.jobs():
            model = self.model[view.id]
            assert (view.state, view.attempts, len(view.images)) == (model.state, model.attempts, model.images)
            assert 0 <= view.attempts <= MAX_ATTEMPTS
            assert (view.finished_at is not None) == view.ended
        counts = self.store.counts()
        assert sum(counts.values()) == len(self.model)


def test_what_ended_never_moves_except_by_retry() -> None:
    assert all(TRANSITIONS[state] <= {State.queued} for state in TERMINAL)
    assert TRANSITIONS[State.succeeded] == TRANSITIONS[State.cancelled] == frozenset()


StoreMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestStoreMachine = StoreMachine.TestCase
