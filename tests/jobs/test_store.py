"""The store's promises, on SQLite and PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from jobs import store_insert
from jobs.db import db_now
from jobs.errors import InvalidSpec, JobConflict, JobNotFound
from jobs.models import MAX_ATTEMPTS, MAX_SOLO_CRASHES, job
from jobs.spec import JobSpec
from jobs.states import TRANSITIONS, State, sources
from jobs.store import Store
from jobs.views import Beat, Claim, Output, Sweep, Unanswered

SPEC = JobSpec(prompt="a red star", steps=4)
EXPIRED_S = -1.0  # a lease that is over when it begins: no test has to wait for one


def picture(index: int = 0) -> Output:
    return Output(index, f"images/{index}.png", seed=7 + index, width=64, height=64, sha256="0" * 64, size_bytes=9)


def submitted(store: Store, spec: JobSpec = SPEC) -> UUID:
    return store.submit([spec])[0].id


def claimed(store: Store, job_id: UUID | None = None, *, lease_s: float = 30.0, alone: bool = False) -> Claim:
    claim = store.claim(job_id or submitted(store), "worker-1", lease_s=lease_s, alone=alone)
    assert claim is not None
    return claim


def lost(store: Store, job_id: UUID | None = None, *, alone: bool = False) -> Claim:
    """A claim whose worker stopped answering, swept up."""
    claim = claimed(store, job_id, lease_s=EXPIRED_S, alone=alone)
    assert store.sweep() == Sweep(requeued=1, failed=0)
    return claim


def row(store: Store, job_id: UUID) -> sa.Row[tuple[object, ...]]:
    with store.engines.reader.connect() as connection:
        return connection.execute(sa.select(job).where(job.c.id == job_id)).one()


def test_a_new_job_is_queued_with_seed_and_time(store: Store) -> None:
    (view,) = store.submit([SPEC], batch="tonight")
    assert view == store.get(view.id)
    assert (view.state, view.attempts, view.error, view.batch) == (State.queued, 0, None, "tonight")
    assert view.spec.seed is not None
    assert view.created_at.tzinfo == UTC


def test_a_batch_keeps_the_order_of_its_specs(store: Store) -> None:
    views = store.submit([JobSpec(prompt=str(number)) for number in range(50)], batch="b")
    assert [view.spec.prompt for view in store.jobs(batch="b")] == [str(number) for number in reversed(range(50))]
    assert [view.id for view in views] == sorted(view.id for view in views)


def test_a_batch_of_several_statements_keeps_its_order(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_insert, "ROWS_AT_ONCE", 7)
    store.submit([JobSpec(prompt=str(number)) for number in range(50)], batch="b")
    assert [view.spec.prompt for view in store.jobs(batch="b")] == [str(number) for number in reversed(range(50))]


def test_a_batch_grows_when_its_name_is_used_again(store: Store) -> None:
    store.submit([SPEC], batch="b")
    store.submit([SPEC, SPEC], batch="b")
    store.submit([SPEC], batch="other")
    assert store.counts("b")[State.queued] == 3
    assert store.counts()[State.queued] == 4
    assert store.counts("nobody's") == dict.fromkeys(State, 0)


def test_a_known_key_gives_the_first_job(store: Store) -> None:
    (first,) = store.submit([SPEC], idempotency_keys=["k"])
    again, other = store.submit([JobSpec(prompt="other"), SPEC], idempotency_keys=["k", None])
    assert again == first
    assert other.id != first.id
    assert store.counts()[State.queued] == 2


def test_a_key_twice_in_one_submit_makes_one_job(store: Store) -> None:
    views = store.submit([SPEC] * 3, idempotency_keys=["k", "k", None])
    assert views[0].id == views[1].id != views[2].id
    assert store.counts()[State.queued] == 2


def test_a_bad_spec_among_many_enqueues_nothing(store: Store, tmp_path: object) -> None:
    with pytest.raises(InvalidSpec, match="init_image"):
        store.submit([SPEC, JobSpec(prompt="x", init_image=b"not stored")])
    with pytest.raises(InvalidSpec, match="idempotency_key"):
        store.submit([SPEC, SPEC], idempotency_keys=[None, "x" * 201])
    with pytest.raises(InvalidSpec, match="keys"):
        store.submit([SPEC, SPEC], idempotency_keys=["only one"])
    with pytest.raises(InvalidSpec, match="batch"):
        store.submit([SPEC], batch="")
    assert store.counts()[State.queued] == 0


def test_submitting_nothing_is_no_error(store: Store) -> None:
    assert store.submit([], batch="empty") == []


def test_a_claim_counts_the_attempt_and_excludes_others(store: Store) -> None:
    claim = claimed(store)
    assert (claim.attempt, claim.worker_id, claim.spec.prompt) == (1, "worker-1", "a red star")
    assert store.claim(claim.job_id, "worker-2") is None
    view = store.get(claim.job_id)
    assert (view.state, view.attempts) == (State.running, 1)
    assert view.started_at is not None


def test_there_is_nothing_to_claim_in_an_unknown_job(store: Store) -> None:
    assert store.claim(uuid4(), "worker-1") is None


def test_a_swept_lease_passes_to_the_next_worker_and_the_first_is_fenced_out(store: Store) -> None:
    old = lost(store)
    new = store.claim(old.job_id, "worker-2", alone=True)
    assert new is not None
    assert (new.attempt, new.token != old.token) == (1, True)
    assert store.finish(old, [picture()]) is False
    assert store.fail(old, "late", retry=True) is None
    assert store.release(old) is False
    assert store.vouch(old) is False
    assert store.confirm_cancelled(old) is False
    assert store.get(old.job_id).state == State.running
    assert store.finish(new, [picture()]) is True
    assert store.finish(old, [picture()]) is False


def test_only_the_sweep_takes_an_expired_lease(store: Store) -> None:
    claim = claimed(store, lease_s=EXPIRED_S)
    assert store.claim(claim.job_id, "worker-2") is None
    assert store.claim(claim.job_id, "worker-2", alone=True) is None
    assert store.finish(claim, [picture()])  # nobody missed it, so it was in time


def test_a_lost_worker_costs_no_attempt_and_makes_a_suspect_that_is_claimed_alone(store: Store) -> None:
    claim = lost(store)
    view = store.get(claim.job_id)
    assert (view.state, view.attempts, view.suspect, view.solo_crashes) == (State.queued, 0, True, 0)
    assert view.error == "the worker worker-1 stopped answering"
    assert store.is_suspect(claim.job_id)
    assert store.claim(claim.job_id, "worker-2") is None
    again = claimed(store, claim.job_id, alone=True)
    assert (again.suspect, again.attempt) == (True, 1)
    assert store.get(claim.job_id).solo_crashes == 1  # counted now: a crash counts nothing any more
    assert not store.is_suspect(claim.job_id)


def test_a_job_that_is_no_suspect_may_be_claimed_alone_too(store: Store) -> None:
    claim = claimed(store, alone=True)
    assert not claim.suspect
    assert store.release(claim)
    assert store.get(claim.job_id).solo_crashes == 0


def test_a_poison_job_fails_after_its_last_crash_alone(store: Store) -> None:
    job_id = lost(store).job_id
    for _ in range(MAX_SOLO_CRASHES - 1):
        lost(store, job_id, alone=True)
    claimed(store, job_id, lease_s=EXPIRED_S, alone=True)
    assert store.sweep() == Sweep(requeued=0, failed=1)
    view = store.get(job_id)
    assert (view.state, view.attempts, view.solo_crashes) == (State.failed, 0, MAX_SOLO_CRASHES)
    assert (
        view.error == "the worker worker-1 stopped answering while it rendered this job alone, as did those before it"
    )
    assert view.finished_at is not None
    store.retry(job_id)
    assert (store.get(job_id).solo_crashes, store.is_suspect(job_id)) == (0, True)


@pytest.mark.parametrize("end", ["finish", "fail", "release", "cancel"])
def test_a_suspect_that_ends_in_order_is_charged_with_no_crash(store: Store, end: str) -> None:
    claim = claimed(store, lost(store).job_id, alone=True)
    match end:
        case "finish":
            assert store.finish(claim, [picture()])
        case "fail":
            assert store.fail(claim, "boom", retry=True) == State.queued
        case "release":
            assert store.release(claim)
        case "cancel":
            store.cancel(claim.job_id)
            assert store.confirm_cancelled(claim)
    assert store.get(claim.job_id).solo_crashes == 0


def test_a_worker_that_lost_its_lease_but_lives_takes_the_suspicion_back(store: Store) -> None:
    claim = lost(store)
    assert store.vouch(claim)
    assert not store.is_suspect(claim.job_id)
    assert not store.vouch(claim)
    alone = lost(store, lost(store).job_id, alone=True)
    assert store.vouch(alone)
    assert (store.get(alone.job_id).solo_crashes, store.is_suspect(alone.job_id)) == (0, True)
    assert not store.vouch(alone)


@pytest.mark.parametrize("suspect", [False, True])
def test_a_worker_without_an_answer_takes_back_just_what_the_claim_made_of_the_job(store: Store, suspect: bool) -> None:
    """It cannot know whether the job that it wanted for itself was a suspect still."""
    job_id = lost(store).job_id if suspect else submitted(store)
    unanswered = Unanswered(job_id, lost(store, job_id, alone=True).token)
    assert store.vouch(unanswered)
    assert (store.get(job_id).suspect, store.get(job_id).solo_crashes) == (suspect, 0)


def test_a_worker_that_vouches_before_the_sweep_gives_the_job_back(store: Store) -> None:
    claim = claimed(store, lease_s=EXPIRED_S)
    assert store.vouch(claim)
    assert store.sweep() == Sweep(0, 0, 0)
    view = store.get(claim.job_id)
    assert (view.state, view.attempts, view.suspect) == (State.queued, 0, False)


@pytest.mark.parametrize("how", ["release", "retry"])
def test_nobody_vouches_for_a_job_that_came_back_another_way(store: Store, how: str) -> None:
    """Else a crash that was given back once would be given back twice."""
    claim = claimed(store, lost(store).job_id, alone=True, lease_s=EXPIRED_S)
    if how == "release":
        assert store.release(claim, suspect=True)
    else:
        with store.engines.writer.begin() as connection:
            connection.execute(sa.update(job).values(solo_crashes=MAX_SOLO_CRASHES))
        assert store.sweep().failed == 1
        store.retry(claim.job_id)
    assert not store.vouch(claim)
    assert (store.get(claim.job_id).solo_crashes, store.is_suspect(claim.job_id)) == (0, True)


def test_finish_records_the_images(store: Store) -> None:
    claim = claimed(store)
    assert store.finish(claim, [picture(0), picture(1)])
    view = store.get(claim.job_id)
    assert (view.state, view.error, view.images) == (State.succeeded, None, (picture(0), picture(1)))
    assert view.started_at is not None
    assert view.finished_at is not None
    assert view.created_at <= view.started_at <= view.finished_at


def test_a_repeated_finish_knows_its_own_result(store: Store) -> None:
    claim = claimed(store)
    assert store.finish(claim, [picture()])
    assert store.finish(claim, [picture()])
    assert store.get(claim.job_id).images == (picture(),)


def test_heartbeat_extends_what_is_held_and_tells_what_is_not(store: Store) -> None:
    gone = lost(store)
    held, wanted = (claimed(store, lease_s=EXPIRED_S) for _ in range(2))
    store.cancel(wanted.job_id)
    assert store.cancel_requested("worker-1") == {wanted.token}
    beat = store.heartbeat("worker-1", [held.token, gone.token, wanted.token])
    assert beat == Beat(held=frozenset({held.token}), cancelled=frozenset({wanted.token}))
    assert store.sweep() == Sweep(0, 0, 0)
    assert store.heartbeat("nobody", [held.token]).held == frozenset()


def test_a_lease_that_its_worker_gave_up_expires_while_the_others_are_extended(store: Store) -> None:
    kept, given_up = (claimed(store, lease_s=EXPIRED_S) for _ in range(2))
    assert store.heartbeat("worker-1", [kept.token]).held == {kept.token}
    assert store.sweep() == Sweep(requeued=1, failed=0)
    assert (store.get(kept.job_id).state, store.get(given_up.job_id).state) == (State.running, State.queued)


def test_a_failed_attempt_waits_and_comes_back(store: Store, end_waiting: Callable[[], None]) -> None:
    claim = claimed(store)
    assert store.fail(claim, "out of luck", retry=True) == State.queued
    assert store.get(claim.job_id).error == "out of luck"
    assert store.claim(claim.job_id, "worker-1") is None
    assert store.due(10) == []
    end_waiting()
    assert [due.id for due in store.due(10)] == [claim.job_id]
    assert claimed(store, claim.job_id).attempt == 2


def test_attempts_are_bounded_and_the_last_error_stays(store: Store, end_waiting: Callable[[], None]) -> None:
    job_id = submitted(store)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        end_waiting()
        state = store.fail(claimed(store, job_id), f"error {attempt}", retry=True)
    assert state == State.failed
    view = store.get(job_id)
    assert (view.attempts, view.error) == (MAX_ATTEMPTS, f"error {MAX_ATTEMPTS}")
    assert store.claim(job_id, "worker-1") is None


def test_an_unusable_input_fails_at_once(store: Store) -> None:
    claim = claimed(store)
    assert store.fail(claim, "unknown model", retry=False) == State.failed


def test_an_error_text_that_no_database_takes_is_cut_to_one_it_does(store: Store) -> None:
    claim = claimed(store)
    store.fail(claim, "nul\0" + "x" * 10_000, retry=False)
    error = store.get(claim.job_id).error
    assert error is not None
    assert error.startswith("nulx")
    assert len(error) <= 4000


def test_release_gives_the_attempt_back(store: Store) -> None:
    claim = claimed(store)
    assert store.release(claim)
    view = store.get(claim.job_id)
    assert (view.state, view.attempts) == (State.queued, 0)
    assert claimed(store, claim.job_id).attempt == 1


def test_a_queued_job_is_cancelled_at_once(store: Store) -> None:
    job_id = submitted(store)
    assert store.cancel(job_id) == State.cancelled
    assert store.claim(job_id, "worker-1") is None
    assert store.get(job_id).finished_at is not None
    with pytest.raises(JobConflict, match="cancelled"):
        store.cancel(job_id)


def test_a_running_job_is_cancelled_by_its_worker(store: Store) -> None:
    claim = claimed(store)
    assert not store.confirm_cancelled(claim)
    assert store.cancel(claim.job_id) == State.running
    assert store.cancel(claim.job_id) == State.running
    assert store.finish(claim, [picture()]) is False
    assert store.confirm_cancelled(claim)
    assert store.get(claim.job_id).state == State.cancelled
    assert store.get(claim.job_id).images == ()


def test_a_wanted_cancel_wins_over_error_and_release(store: Store) -> None:
    failed, released = claimed(store), claimed(store)
    store.cancel(failed.job_id)
    store.cancel(released.job_id)
    assert store.fail(failed, "boom", retry=True) == State.cancelled
    assert store.release(released)
    assert store.get(released.job_id).state == State.cancelled


def test_retry_takes_failed_jobs_only(store: Store) -> None:
    claim = claimed(store)
    with pytest.raises(JobConflict, match="running"):
        store.retry(claim.job_id)
    store.fail(claim, "boom", retry=False)
    store.retry(claim.job_id)
    view = store.get(claim.job_id)
    assert (view.state, view.attempts, view.finished_at) == (State.queued, 0, None)
    with pytest.raises(JobNotFound):
        store.retry(uuid4())
    with pytest.raises(JobNotFound):
        store.cancel(uuid4())
    with pytest.raises(JobNotFound):
        store.get(uuid4())


def test_sweep_decides_by_cancel_and_crashes(store: Store) -> None:
    crasher = lost(store).job_id
    for _ in range(MAX_SOLO_CRASHES - 1):
        lost(store, crasher, alone=True)
    claimed(store, crasher, lease_s=EXPIRED_S, alone=True)
    alive, expired, wanted = (submitted(store) for _ in range(3))
    claimed(store, alive)
    claimed(store, expired, lease_s=EXPIRED_S)
    claimed(store, wanted, lease_s=EXPIRED_S)
    store.cancel(wanted)
    assert store.sweep() == Sweep(requeued=1, failed=1, cancelled=1)
    states = [store.get(job_id).state for job_id in (alive, expired, crasher, wanted)]
    assert states == [State.running, State.queued, State.failed, State.cancelled]
    assert store.sweep() == Sweep(0, 0, 0)


def test_a_lost_worker_spends_no_attempt_of_a_job_that_had_only_one_left(store: Store) -> None:
    job_id = submitted(store)
    with store.engines.writer.begin() as connection:
        connection.execute(sa.update(job).values(attempts=MAX_ATTEMPTS - 1))
    lost(store, job_id)
    assert claimed(store, job_id, alone=True).attempt == MAX_ATTEMPTS


def test_a_released_job_may_wait_with_a_reason_and_keeps_where_its_rows_are(
    store: Store, end_waiting: Callable[[], None]
) -> None:
    claim = claimed(store)
    assert store.release(claim, wait_s=60, reason="403 Forbidden", saved_key="saved/a")
    view = store.get(claim.job_id)
    assert (view.state, view.attempts, view.error, view.suspect) == (State.queued, 0, "403 Forbidden", False)
    assert store.claim(claim.job_id, "worker-1") is None
    end_waiting()
    again = claimed(store, claim.job_id)
    assert again.saved_key == "saved/a"
    assert store.release(again)  # not a step further: what was saved still holds
    assert claimed(store, claim.job_id).saved_key == "saved/a"


def test_a_step_that_broke_for_many_makes_suspects_and_costs_nothing(store: Store) -> None:
    claim = claimed(store)
    assert store.release(claim, reason="the step broke", suspect=True)
    view = store.get(claim.job_id)
    assert (view.attempts, view.solo_crashes, view.suspect) == (0, 0, True)


@pytest.mark.parametrize("end", ["finish", "fail", "cancel", "cancel queued", "cancelled release", "crash alone"])
def test_saved_rows_are_forgotten_with_the_end_or_what_they_may_have_caused(store: Store, end: str) -> None:
    """What no row names any more is an orphan, which `prune` removes."""
    saved = claimed(store, lost(store).job_id if end == "crash alone" else None, alone=True)
    assert store.release(saved, saved_key="saved/a")
    job_id = saved.job_id
    match end:
        case "finish":
            store.finish(claimed(store, job_id), [picture()])
        case "fail":
            store.fail(claimed(store, job_id), "boom", retry=True)
        case "cancel":
            claim = claimed(store, job_id)
            store.cancel(job_id)
            store.confirm_cancelled(claim)
        case "cancel queued":
            store.cancel(job_id)
        case "cancelled release":
            claim = claimed(store, job_id)
            store.cancel(job_id)
            store.release(claim, saved_key="saved/b")
        case "crash alone":
            lost(store, job_id, alone=True)
    assert row(store, job_id).saved_key is None


def test_a_crash_in_company_leaves_the_saved_rows_to_the_next(store: Store) -> None:
    saved = claimed(store)
    assert store.release(saved, saved_key="saved/a")
    lost(store, saved.job_id)
    assert claimed(store, saved.job_id, alone=True).saved_key == "saved/a"


def test_the_traceback_of_the_last_error_is_kept_and_cut(store: Store) -> None:
    claim = claimed(store)
    store.fail(claim, "boom", retry=False, traceback="Traceback\0" + "x" * 50_000)
    traceback = store.get(claim.job_id).traceback
    assert traceback is not None
    assert traceback.startswith("Tracebackx")
    assert len(traceback) <= 20_000


def test_due_is_urgent_first_then_oldest_and_rings_once(store: Store) -> None:
    plain, later = submitted(store), submitted(store)
    urgent = submitted(store, JobSpec(prompt="x", priority=9))
    other = submitted(store, JobSpec(prompt="x", model="other"))
    assert [(due.id, due.priority) for due in store.due(2, older_than_s=60)] == [(urgent, 9), (plain, 0)]
    assert [due.id for due in store.due(10, models=["nightshift-mini"], older_than_s=60)] == [later]
    assert [due.id for due in store.due(10, models=[], older_than_s=60)] == []
    assert [due.id for due in store.due(10, older_than_s=60)] == [other]
    assert store.due(10, older_than_s=60) == []
    assert {due.id for due in store.due(10)} == {plain, later, urgent, other}


def test_a_rung_submit_leaves_the_sweeper_quiet(store: Store) -> None:
    store.submit([SPEC], rung=True)
    assert store.due(10, older_than_s=60) == []


def test_unfinished_counts_what_is_left(store: Store) -> None:
    claim, _ = claimed(store), submitted(store, JobSpec(prompt="x", model="other"))
    assert (store.unfinished(), store.unfinished(["other"]), store.unfinished([])) == (2, 1, 0)
    store.finish(claim, [])
    assert store.unfinished(["nightshift-mini"]) == 0


def test_a_spec_of_another_version_is_left_to_workers_of_that_and_fails_when_none_comes(store: Store) -> None:
    job_id = submitted(store)
    with store.engines.writer.begin() as connection:
        connection.execute(sa.update(job).values(spec='{"prompt": "x", "hologram": 1}'))
    assert store.claim(job_id, "worker-1") is None
    left = store.get(job_id)
    assert (left.state, left.attempts) == (State.queued, 1)
    assert "hologram" in str(left.error)
    assert store.due(1) == []  # not at once: the same worker would only say the same
    for _ in range(2):
        with store.engines.writer.begin() as connection:
            connection.execute(sa.update(job).values(available_at=db_now()))
        assert store.claim(job_id, "worker-1") is None
    failed = store.get(job_id)
    assert failed.state is State.failed
    assert "hologram" in str(failed.error)


def test_the_databases_clock_compares_like_time(store: Store) -> None:
    with store.engines.reader.connect() as connection:
        early, now, late = connection.execute(sa.select(db_now(-0.5), db_now(), db_now(86400.25))).one()
        assert early < now < late
        assert connection.scalar(sa.select(db_now(-0.002) < db_now()))
        assert not connection.scalar(sa.select(db_now(1) < db_now()))
    # Within a millisecond, which is what SQLite's clock keeps.
    assert (now - early).total_seconds() == pytest.approx(0.5, abs=0.05)


def test_leases_are_on_the_databases_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = submitted(store)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 0.0)  # this machine believes in 1970
        claim = claimed(store, job_id)
    assert store.sweep() == Sweep(0, 0, 0)
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: 9e9)  # and now in 2255
        assert store.sweep() == Sweep(0, 0, 0)
    assert store.finish(claim, [picture()])


def test_every_state_is_in_the_transitions() -> None:
    assert set(TRANSITIONS) == set(State)
    assert sources(State.succeeded) == (State.running,)
    assert sources(State.cancelled) == (State.queued, State.running)


def test_the_sweepers_look_reads_its_index_in_order_and_sorts_nothing(sqlite_store: Store) -> None:
    seen: list[tuple[str, tuple[object, ...]]] = []
    sa.event.listen(sqlite_store.engines.writer, "before_cursor_execute", lambda *args: seen.append((args[2], args[3])))
    sqlite_store.due(5, older_than_s=5)
    statement, values = next(each for each in seen if "UPDATE job" in each[0])
    with sqlite_store.engines.reader.connect() as connection:
        plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all())
    assert "USING INDEX job_due_ix" in plan
    assert "TEMP B-TREE" not in plan


def test_a_leaving_process_gives_all_its_jobs_back_in_one_statement(store: Store) -> None:
    kept, lost, wanted = (claimed(store, submitted(store)) for _ in range(3))
    store.fail(lost, "ended elsewhere", retry=False)
    store.cancel(wanted.job_id)
    assert store.release_all([kept, lost, wanted]) == 2
    assert [store.get(claim.job_id).state for claim in (kept, lost, wanted)] == [
        State.queued,
        State.failed,
        State.cancelled,
    ]
    assert store.get(kept.job_id).attempts == 0
    assert store.release_all([]) == 0
