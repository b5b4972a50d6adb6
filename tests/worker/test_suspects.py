"""Who is drawn alone, who is charged, and who never is."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID

import pytest

from jobs import Settings, State
from jobs.storage import DirStorage, open_storage
from jobs.store import Store
from jobs.views import JobView
from sd_engine import Request
from tests.fakes import FakeEngine, fake_workshop
from tests.worker.helpers import PATIENCE_S, Gate, wait
from tests.worker.test_tasks import World, objects, store, submit
from worker.engine_thread import Pixels
from worker.heartbeat import Voucher
from worker.reasons import Draining, LeaseLost
from worker.tasks import render

__all__ = ["store"]  # the fixture


@pytest.fixture
def make_world(store: Store, settings: Settings) -> Iterator[Callable[..., World]]:
    worlds: list[World] = []

    def make(before_step: Callable[[FakeEngine], None] = lambda engine: None) -> World:
        worlds.append(World(store, open_storage(settings.storage_url), fake_workshop(before_step=before_step)))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@contextmanager
def rendering(world: World, *jobs: JobView) -> Iterator[None]:
    """All at once, each in a thread of its own; over when all stories are."""
    threads = [threading.Thread(target=world.render, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    yield
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def make_suspect(store: Store, job: JobView) -> None:
    """A worker took it and was never heard of again."""
    assert store.claim(job.id, "host:9:gone", lease_s=-1.0)
    assert store.sweep().requeued == 1


def test_a_suspect_is_drawn_while_nothing_else_is(store: Store, make_world: Callable[..., World]) -> None:
    others, suspect = [submit(store, steps=5) for _ in range(3)], submit(store, steps=5, seed=99)
    make_suspect(store, suspect)
    packs: list[set[int]] = []
    world = make_world(lambda engine: packs.append({row.request.seed for row in engine._rows.values()}))
    with rendering(world, *others, suspect):
        pass
    assert {store.get(job.id).state for job in [*others, suspect]} == {State.succeeded}
    assert {frozenset(pack) for pack in packs if 99 in pack} == {frozenset({99})}


def test_a_suspect_waits_until_its_neighbours_are_stored(store: Store, make_world: Callable[..., World]) -> None:
    """They are held until then, and would be lost with it."""
    world, neighbour, suspect = make_world(), submit(store), submit(store)
    make_suspect(store, suspect)
    storing, go_on, held = threading.Event(), threading.Event(), list[int]()

    class Slow(DirStorage):
        def put(self, key: str, data: bytes, content_type: str) -> None:
            if str(neighbour.id) in key:
                storing.set()
                wait(go_on)
            else:
                held.append(len(world.leases.held()))
            super().put(key, data, content_type)

    assert isinstance(world.deps.storage, DirStorage)
    deps = replace(world.deps, outside=replace(world.deps.outside, storage=Slow(world.deps.storage._root)))
    render(str(neighbour.id), deps)
    wait(storing)
    second = threading.Thread(target=render, args=(str(suspect.id), deps), daemon=True)
    second.start()
    second.join(0.1)  # a moment in which it could be claimed is all the evidence there is
    assert store.get(suspect.id).state is State.queued
    go_on.set()
    second.join(PATIENCE_S)
    assert {store.get(job.id).state for job in (neighbour, suspect)} == {State.succeeded}
    assert held == [1]


def test_a_step_that_breaks_for_many_sends_all_back_uncharged_and_only_the_culprit_fails(
    store: Store, make_world: Callable[..., World]
) -> None:
    culprit, innocent = submit(store, prompt="the culprit", steps=50), submit(store, prompt="innocent", steps=50)

    def break_with_culprit(engine: FakeEngine) -> None:
        rows = [row.request.prompt for row in engine._rows.values()]
        alone = store.get(culprit.id).suspect
        if "the culprit" in rows and (alone or len(rows) == 2):
            raise RuntimeError("the step broke")

    world = make_world(break_with_culprit)
    with rendering(world, culprit, innocent):
        pass
    for job in (culprit, innocent):
        after = store.get(job.id)
        assert (after.state, after.attempts, after.suspect) == (State.queued, 0, True)
        assert after.error == "RuntimeError: the step broke"
    with rendering(world, culprit, innocent):
        pass
    charged, free = store.get(culprit.id), store.get(innocent.id)
    assert (free.state, free.attempts, free.error) == (State.succeeded, 1, None)
    assert (charged.state, charged.attempts, charged.solo_crashes) == (State.queued, 1, 0), (
        "it raised, it did not crash"
    )
    assert charged.traceback is not None and "break_with_culprit" in charged.traceback


def test_a_worker_that_lost_a_lease_and_lives_takes_the_suspicion_back(
    store: Store, make_world: Callable[..., World]
) -> None:
    gate = Gate()
    world, job = make_world(gate), submit(store, steps=5)
    with rendering(world, job):
        wait(gate.reached)
        (lease,) = world.leases.held().values()
        store.heartbeat(world.deps.worker_id, [lease.claim.token], lease_s=-1.0)
        assert store.sweep().requeued == 1
        assert store.get(job.id).suspect
        world.leases.interrupt(lease.claim.token, LeaseLost("the clock of the lease ran out"))
        gate.opened.set()
    Voucher(store, world.leases, look_s=1).tick()
    after = store.get(job.id)
    assert (after.state, after.attempts, after.suspect) == (State.queued, 0, False)
    assert objects(world.deps.storage) == []


@pytest.mark.parametrize("ends", ["broken", "drained"])
def test_saved_rows_stay_for_whoever_took_the_job_over(
    store: Store, make_world: Callable[..., World], ends: str
) -> None:
    gate, job = Gate(), submit(store, steps=5, prompt="a broken row" if ends == "broken" else "a star")
    world = make_world(gate)
    leaving = store.claim(job.id, "host:0:leaving")
    assert leaving is not None
    key = f"saved/{job.id}/{leaving.token}.safetensors"
    world.deps.storage.put(key, b"its rows", "application/octet-stream")
    store.release(leaving, saved_key=key)
    with rendering(world, job):
        wait(gate.reached)
        (lease,) = world.leases.held().values()
        assert store.release(lease.claim), "the lease is lost, and the job back in the queue"
        if ends == "drained":
            world.leases.interrupt(lease.claim.token, Draining("the worker ends", b"its later rows"))
        gate.opened.set()
    after = store.claim(job.id, "host:2:next")
    assert after is not None and after.saved_key == key
    assert world.deps.storage.exists(key)


def test_a_drained_job_goes_on_from_its_saved_rows(store: Store, make_world: Callable[..., World]) -> None:
    gate = Gate()
    first, job = make_world(gate), submit(store, steps=5)
    with rendering(first, job):
        wait(gate.reached)
        gate.opened.set()
        (token,) = first.leases.held()
        first.leases.interrupt(token, Draining("the worker ends", b"its rows"))
    claim = store.claim(job.id, "host:2:next")
    assert claim is not None and claim.saved_key is not None
    assert first.deps.storage.get(claim.saved_key) == b"its rows"
    store.release(claim)
    second, given = make_world(), list[bytes | None]()
    engine_render = second.engine.render

    def look(
        key: UUID, requests: Sequence[Request], saved: bytes | None = None, *, urgent: bool = False
    ) -> Future[list[Pixels]]:
        given.append(saved)
        return engine_render(key, requests)

    second.engine.render = look  # type: ignore[method-assign]
    second.render(job)
    assert given == [b"its rows"]
    assert store.get(job.id).state is State.succeeded
    assert not second.deps.storage.exists(claim.saved_key), "nobody needs it any more"
