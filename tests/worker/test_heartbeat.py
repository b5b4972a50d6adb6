"""The heartbeat, with the real store: what it extends, what it interrupts, when it stops trusting itself."""

import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from uuid import UUID, uuid4

import pytest

from jobs import JobSpec, Settings, State, schema
from jobs.store import Store
from jobs.views import Beat, Claim, Unanswered
from tests.worker.helpers import PATIENCE_S, Clock, wait
from worker.exit_codes import BROKEN
from worker.heartbeat import Fence, Heartbeat, Voucher
from worker.leases import Lease, Leases
from worker.reasons import CancelAsked, Interrupted, LeaseLost

WORKER = "host:1:test"


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    yield store
    store.close()


class World:
    """One heartbeat, its clock, and what it interrupted."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, Clock()
        self.interrupted: dict[UUID, Interrupted] = {}
        self.leases = Leases(self.interrupted.__setitem__)
        self.heartbeat = self.beating_with(store)
        self.held = ExitStack()

    def beating_with(self, store: Store) -> Heartbeat:
        return Heartbeat(store, self.leases, WORKER, lease_s=30, beat_s=10, poll_s=1, clock=self.clock)

    def claim(self) -> tuple[Claim, Lease]:
        job = self.store.submit([JobSpec(prompt="a star")])[0]
        claim = self.store.claim(job.id, WORKER)
        assert claim is not None
        return claim, self._took(self.leases.take(claim, self.clock.now))

    def _took(self, lease: Lease) -> Lease:
        self.held.callback(self.leases.drop, lease)
        return lease


@pytest.fixture
def world(store: Store) -> World:
    return World(store)


def test_a_beat_extends_the_leases_and_interrupts_nothing(world: World) -> None:
    _, lease = world.claim()
    world.clock.now += 10
    world.heartbeat.beat()
    assert (lease.trusted_since, world.interrupted) == (world.clock.now, {})


def test_a_cancelled_job_is_interrupted_between_two_beats(world: World) -> None:
    claim, lease = world.claim()
    world.heartbeat.tick()
    world.store.cancel(claim.job_id)
    world.clock.now += 1
    world.heartbeat.tick()
    assert isinstance(world.interrupted[claim.token], CancelAsked)
    with pytest.raises(CancelAsked):
        lease.check()


def test_a_job_that_somebody_else_ended_is_lost(world: World) -> None:
    claim, _ = world.claim()
    world.store.fail(claim, "ended elsewhere", retry=False)
    world.heartbeat.beat()
    assert isinstance(world.interrupted[claim.token], LeaseLost)


def test_a_claim_made_during_a_beat_is_not_called_lost(world: World) -> None:
    class ClaimsMeanwhile(Store):
        def heartbeat(self, worker_id: str, tokens: Collection[UUID], *, lease_s: float = 30.0) -> Beat:
            beat = super().heartbeat(worker_id, tokens, lease_s=lease_s)
            world.claim()
            return beat

    world.claim()
    world.beating_with(ClaimsMeanwhile(world.store.engines)).beat()
    assert world.interrupted == {}


def test_a_lease_is_given_up_once_it_was_not_extended_for_its_length(world: World) -> None:
    claim, lease = world.claim()
    fence = Fence(world.leases, lease_s=30, look_s=1, clock=world.clock)
    world.clock.now += 30
    fence.tick()
    assert world.interrupted == {}, "29.999 s are still ours"
    world.clock.now += 0.001
    fence.tick()
    assert isinstance(world.interrupted[claim.token], LeaseLost)
    with pytest.raises(LeaseLost):
        lease.check()


def test_a_beat_does_not_wait_for_the_answer_about_a_lost_claim(world: World) -> None:
    """Else a row that somebody locks, or many claims without an answer, would cost all the other leases."""
    vouching, answered = threading.Event(), threading.Event()

    class Hangs(Store):
        def vouch(self, claim: Claim | Unanswered) -> bool:
            vouching.set()
            return answered.wait(PATIENCE_S)

    _, lease = world.claim()
    hangs = Hangs(world.store.engines)
    world.leases.lose(Unanswered(uuid4(), uuid4()))
    voucher = Voucher(hangs, world.leases, look_s=1)
    voucher.start()
    wait(vouching)
    world.clock.now += 10
    world.beating_with(hangs).tick()
    assert lease.trusted_since == world.clock.now
    voucher.stop()
    answered.set()
    voucher.join(PATIENCE_S)


def test_a_lease_that_ended_here_is_not_interrupted(world: World) -> None:
    claim, _ = world.claim()
    world.held.close()
    world.leases.interrupt(claim.token, LeaseLost())
    assert world.interrupted == {}


def test_the_database_sees_one_statement_for_many_leases(world: World) -> None:
    tokens = {world.claim()[0].token for _ in range(3)}
    assert world.store.heartbeat(WORKER, tokens).held == tokens


def test_a_job_that_was_left_to_its_lease_is_not_kept_alive_by_its_neighbours(store: Store, world: World) -> None:
    """The worker could not write its end (the database was away for a moment) and lives on."""
    expired = Heartbeat(store, world.leases, WORKER, lease_s=-1, beat_s=10, poll_s=1, clock=world.clock)
    world.claim()
    expired.beat()
    world.held.close()
    neighbour, _ = world.claim()
    world.heartbeat.beat()
    assert store.sweep().requeued == 1
    assert store.get(neighbour.job_id).state is State.running


def test_a_process_does_not_outlive_its_heartbeat(world: World) -> None:
    class Dies(Store):
        def heartbeat(self, worker_id: str, tokens: Collection[UUID], *, lease_s: float = 30.0) -> Beat:
            raise SystemExit

    world.claim()
    codes: list[int] = []
    heartbeat = world.beating_with(Dies(world.store.engines))
    heartbeat.die = codes.append
    heartbeat.start()
    heartbeat.join(PATIENCE_S)
    assert codes == [BROKEN]
