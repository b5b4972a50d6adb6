"""The story of one job, with the real store (SQLite), the real directory storage and a fake engine."""

import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

from jobs import JobSpec, Settings, State, schema
from jobs.errors import StorageError
from jobs.storage import DirStorage, Storage, open_storage
from jobs.store import Store
from jobs.views import JobView
from tests.fakes import FakeEngine, fake_image, fake_workshop
from tests.worker.helpers import PATIENCE_S, Clock, once
from worker.delivery import Outside
from worker.engine_thread import EngineThread, Workshop
from worker.leases import Leases
from worker.reasons import LeaseLost
from worker.slots import Slots
from worker.solitude import Solitude
from worker.tasks import Deps, render
from worker.translate import to_requests
from worker.uploads import Uploads


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    yield store
    store.close()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    return open_storage(settings.storage_url)


class World:
    """One worker's dependencies around a fake engine."""

    def __init__(self, store: Store, storage: Storage, workshop: Workshop) -> None:
        self.engine = EngineThread(lambda: workshop)
        self.engine.start()
        self.leases = Leases(self.engine.interrupt)
        self.deps = Deps(
            outside=Outside(store, storage, back_off_s=(0.0, 0.01, 0.02, 0.03), patience_s=PATIENCE_S, snooze_s=60.0),
            engine=self.engine,
            leases=self.leases,
            slots=Slots(4, forget_s=5, clock=Clock()),
            worker_id="host:1:test",
            lease_s=30.0,
            broken=workshop.broken,
            solitude=Solitude(),
            uploads=Uploads(8, threads=2),
        )

    def render(self, job: JobView, **outside: object) -> None:
        """The job's story to its end, with a part of the outside exchanged."""
        deps = replace(self.deps, outside=replace(self.deps.outside, **outside))  # type: ignore[arg-type]
        render(str(job.id), deps)
        deps.uploads.join()

    def close(self) -> None:
        self.engine.close()
        self.engine.join(PATIENCE_S)


@pytest.fixture
def world(store: Store, storage: Storage) -> Iterator[World]:
    world = World(store, storage, fake_workshop())
    yield world
    world.close()


def submit(store: Store, **fields: object) -> JobView:
    return store.submit([JobSpec.model_validate({"prompt": "a red star", "seed": 5, "steps": 3} | fields)])[0]


def objects(storage: Storage) -> list[str]:
    assert isinstance(storage, DirStorage)
    root = storage._root
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png") if "images" in path.parts)


def test_a_job_ends_with_its_images_stored_and_named_in_the_row(world: World, store: Store, storage: Storage) -> None:
    job = submit(store, images=2)
    world.render(job)
    done = store.get(job.id)
    assert (done.state, done.attempts, [image.seed for image in done.images]) == (State.succeeded, 1, [5, 6])
    for image in done.images:
        data = storage.get(image.key)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (image.sha256, image.size_bytes)
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == (image.width, image.height)
    assert objects(storage) == sorted(image.key for image in done.images)
    assert done.images[0].key.startswith(f"images/{job.id}/")


@pytest.mark.parametrize("message", ["", "not an id", "'; DROP TABLE job; --", str(uuid4())])
def test_garbage_and_unknown_ids_are_dropped(world: World, message: str) -> None:
    render(message, world.deps)


def test_a_second_bell_for_a_finished_job_changes_nothing(world: World, store: Store, storage: Storage) -> None:
    job = submit(store)
    world.render(job)
    before, stored = store.get(job.id), objects(storage)
    world.render(job)
    assert (store.get(job.id), objects(storage)) == (before, stored)


def test_a_suspect_is_alone_until_it_is_shown(world: World, store: Store, storage: Storage) -> None:
    """A crash of the next suspect while this one is being stored would be held against both."""
    job = submit(store)
    claim = store.claim(job.id, "a worker that died", lease_s=-1)
    assert claim is not None
    store.sweep()
    entered: list[bool] = []

    class Looking(DirStorage):
        def put(self, key: str, data: bytes, content_type: str) -> None:
            entered.append(world.deps.solitude._alone)
            super().put(key, data, content_type)

    assert isinstance(storage, DirStorage)
    world.render(job, storage=Looking(storage._root))
    assert store.get(job.id).state is State.succeeded
    assert entered == [True]


def test_a_process_that_leaves_claims_nothing(world: World, store: Store) -> None:
    job = submit(store)
    world.deps.solitude.close()
    world.render(job)
    assert (store.get(job.id).state, store.get(job.id).attempts) == (State.queued, 0)


def test_a_drained_job_goes_back_and_keeps_its_attempt(world: World, store: Store) -> None:
    job = submit(store)
    world.engine.drain(0.0)
    world.render(job)
    assert (store.get(job.id).state, store.get(job.id).attempts) == (State.queued, 0)


def test_an_error_of_the_engine_is_kept_and_the_job_waits_for_another_attempt(world: World, store: Store) -> None:
    job = submit(store, prompt="a broken row")
    world.render(job)
    after = store.get(job.id)
    assert (after.state, after.attempts, after.error) == (State.queued, 1, "ArithmeticError: not finite")


def test_an_unknown_model_fails_at_once_with_the_reason(world: World, store: Store) -> None:
    job = submit(store, model="unheard-of")
    world.render(job)
    after = store.get(job.id)
    assert after.state is State.failed
    assert after.error is not None and "unheard-of" in after.error and "nightshift-mini" in after.error


def test_a_model_that_could_not_be_loaded_fails_its_jobs_at_once(store: Store, storage: Storage) -> None:
    world = World(store, storage, fake_workshop(broken={"torn": "unet/model.safetensors is cut short"}))
    job = submit(store, model="torn")
    world.render(job)
    world.close()
    after = store.get(job.id)
    assert after.state is State.failed
    assert after.error is not None and "cut short" in after.error


def test_an_init_image_that_is_gone_or_broken_fails_at_once(world: World, store: Store, storage: Storage) -> None:
    gone, broken = (f"inputs/{digit * 64}.png" for digit in "ab")
    storage.put(broken, b"no picture", "image/png")
    for key, reason in ((gone, "not in the storage"), (broken, "init_image=.*one of PNG")):
        job = submit(store, init_image=key)
        world.render(job)
        after = store.get(job.id)
        assert (after.state, after.attempts) == (State.failed, 1)
        assert after.error is not None and re.search(reason, after.error)


def test_a_job_cancelled_while_it_is_drawn_ends_cancelled_and_leaves_no_object(store: Store, storage: Storage) -> None:
    job = submit(store, steps=2)
    # The request arrives in the middle; the heartbeat has not told us yet, so only the guarded finish can notice.
    world = World(store, storage, fake_workshop(before_step=once(lambda: store.cancel(job.id))))
    world.render(job)
    world.close()
    assert store.get(job.id).state is State.cancelled
    assert objects(storage) == []


def test_a_job_whose_lease_is_lost_while_it_is_drawn_is_dropped(store: Store, storage: Storage) -> None:
    job = submit(store, steps=1000)
    worlds: list[World] = []

    def lose() -> None:
        (token,) = worlds[0].leases.held()
        worlds[0].leases.interrupt(token, LeaseLost("taken over"))

    worlds.append(World(store, storage, fake_workshop(before_step=once(lose))))
    worlds[0].render(job)
    worlds[0].close()
    assert store.get(job.id).state is State.running  # whoever owns it decides
    assert objects(storage) == []


def test_objects_of_a_lost_lease_are_deleted_after_the_upload(world: World, store: Store, storage: Storage) -> None:
    class TakenOver(DirStorage):
        """While our upload runs, the lease ends and another worker's attempt fails the job."""

        def put(self, key: str, data: bytes, content_type: str) -> None:
            super().put(key, data, content_type)
            (lease,) = world.leases.held().values()
            store.fail(lease.claim, "ended elsewhere", retry=False)

    assert isinstance(storage, DirStorage)
    job = submit(store)
    world.render(job, storage=TakenOver(storage._root))
    assert store.get(job.id).state is State.failed
    assert objects(storage) == []


class Flaky(DirStorage):
    """Refuses the first puts."""

    def __init__(self, like: Storage, failures: int) -> None:
        assert isinstance(like, DirStorage)
        super().__init__(like._root)
        self.failures = failures

    def put(self, key: str, data: bytes, content_type: str) -> None:
        if self.failures:
            self.failures -= 1
            raise StorageError("slow down")
        super().put(key, data, content_type)


def test_transient_storage_errors_are_waited_out_without_drawing_again(
    world: World, store: Store, storage: Storage
) -> None:
    job = submit(store)
    world.render(job, storage=Flaky(storage, 3))
    assert (store.get(job.id).state, store.get(job.id).attempts) == (State.succeeded, 1)


def test_a_storage_that_stays_away_costs_no_attempt_and_the_job_waits(
    world: World, store: Store, storage: Storage
) -> None:
    job = submit(store)
    world.render(job, storage=Flaky(storage, 99), patience_s=0.1)
    after = store.get(job.id)
    assert (after.state, after.attempts, after.error) == (State.queued, 0, "StorageError: slow down")
    assert store.due(9) == [], "it is not rung for before the snooze is over"


class SilentCommit(Store):
    """The database applies the first ``finish`` and its answer is lost."""

    answers_lost = 1

    def finish(self, *args: object) -> bool:
        done = super().finish(*args)  # type: ignore[arg-type]
        if self.answers_lost:
            self.answers_lost -= 1
            raise ConnectionError("connection reset")
        return done


def test_a_finish_whose_answer_was_lost_still_shows_its_images(world: World, store: Store, storage: Storage) -> None:
    job = submit(store)
    world.render(job, store=SilentCommit(store.engines))
    done = store.get(job.id)
    assert done.state is State.succeeded
    assert objects(storage) == [done.images[0].key]


def test_when_the_database_never_answers_the_objects_stay(world: World, store: Store, storage: Storage) -> None:
    silent = SilentCommit(store.engines)
    silent.answers_lost = 99
    job = submit(store)
    world.render(job, store=silent)
    assert objects(storage) == [image.key for image in store.get(job.id).images]


class Exits(Store):
    """The database shows the images, and no answer is ever heard: the thread is told to end."""

    def finish(self, *args: object) -> bool:
        super().finish(*args)  # type: ignore[arg-type]
        raise SystemExit


class RunsOutOfMemory(DirStorage):
    """Fails to remove the first object."""

    failures = 1

    def delete(self, key: str) -> None:
        if self.failures:
            self.failures -= 1
            raise MemoryError
        super().delete(key)


@pytest.mark.parametrize("broken", ["answer", "tidying"])
def test_images_that_are_shown_stay_whatever_is_raised_afterwards(
    world: World, store: Store, storage: Storage, broken: str
) -> None:
    job = submit(store)
    before = store.claim(job.id, "host:0:leaving")
    assert isinstance(storage, DirStorage) and before is not None
    store.release(before, saved_key=f"saved/{job.id}/{before.token}.safetensors")
    if broken == "answer":
        world.render(job, store=Exits(store.engines))
    else:
        world.render(job, storage=RunsOutOfMemory(storage._root))
    done = store.get(job.id)
    assert done.state is State.succeeded
    assert objects(storage) == [image.key for image in done.images]


def test_nothing_that_happens_inside_leaves_the_task(world: World, store: Store) -> None:
    class Away(Store):
        def claim(self, *args: object, **options: object) -> None:
            raise MemoryError

    world.render(submit(store), store=Away(store.engines))
    assert world.deps.slots.free() == 4


def test_img2img_starts_from_the_stored_picture(world: World, store: Store, storage: Storage) -> None:
    seen: list[np.ndarray] = []
    picture = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    key = f"inputs/{'c' * 64}.png"
    storage.put(key, buffer.getvalue(), "image/png")

    class Looks:
        """Keeps the init image that reaches the engine."""

        def render(self, token: object, requests: list, saved: object, **_: object) -> object:  # type: ignore[type-arg]
            seen.extend(request.init_image for request in requests)
            return world.engine.render(token, requests, None)  # type: ignore[arg-type]

    job = submit(store, init_image=key, strength=0.5)
    deps = replace(world.deps, engine=Looks())  # type: ignore[arg-type]
    render(str(job.id), deps)
    deps.uploads.join()
    np.testing.assert_array_equal(seen[0], picture)
    assert store.get(job.id).state is State.succeeded


def test_the_pixels_in_storage_are_those_of_the_engine(world: World, store: Store, storage: Storage) -> None:
    job = submit(store, seed=77)
    world.render(job)
    with Image.open(io.BytesIO(storage.get(store.get(job.id).images[0].key))) as picture:
        from_storage = np.asarray(picture)
    np.testing.assert_array_equal(from_storage, fake_image(to_requests(job.spec, storage)[0]))


@pytest.mark.parametrize(("priority", "urgent"), [(0, False), (6, False), (7, True), (9, True)])
def test_the_engine_hears_that_somebody_waits(store: Store, storage: Storage, priority: int, urgent: bool) -> None:
    engines: list[FakeEngine] = []
    world = World(store, storage, fake_workshop(before_step=engines.append))
    world.render(submit(store, priority=priority))
    world.close()
    assert len(engines[0].urgent) == urgent
