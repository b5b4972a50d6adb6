"""Housekeeping takes what is old and what nobody names, and nothing else: on real databases and real storages."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from jobs import prune as prune_module
from jobs import schema
from jobs.db import db_now
from jobs.models import batch as batch_table
from jobs.models import job as job_table
from jobs.prune import Bites, Order, Prune, Pruned, owner_of, silently
from jobs.spec import JobSpec
from jobs.states import State
from jobs.storage import Storage, open_storage
from jobs.store import Store
from jobs.store_prune import Filter, Housekeeper
from jobs.views import Claim, JobView, Output
from tests.conftest import Bucket

NOW = timedelta(0)
ALL = Order(older_than=NOW, orphans_older_than=NOW)
INPUT = f"inputs/{'a' * 64}.png"


@dataclass(frozen=True)
class House:
    """A database and a storage, and what a worker does to both."""

    store: Store
    storage: Storage
    database_url: str
    storage_url: str

    def submit(self, *, batch: str | None = None, init_image: str | None = None) -> UUID:
        spec = JobSpec(prompt="x", width=64, height=64, init_image=init_image)
        return self.store.submit([spec], batch=batch)[0].id

    def claim(self, job_id: UUID) -> Claim:
        claim = self.store.claim(job_id, "stand-in", alone=True)
        assert claim is not None
        return claim

    def upload(self, claim: Claim) -> Output:
        data = str(claim.token).encode()
        key = f"images/{claim.job_id}/{claim.token}/0.png"
        self.storage.put(key, data, "image/png")
        return Output(0, key, 0, 64, 64, hashlib.sha256(data).hexdigest(), len(data))

    def succeed(self, **fields: str) -> UUID:
        claim = self.claim(self.submit(**fields))
        assert self.store.finish(claim, [self.upload(claim)])
        return claim.job_id

    def fail(self, **fields: str) -> UUID:
        claim = self.claim(self.submit(**fields))
        assert self.store.fail(claim, "broken", retry=False) == State.failed
        return claim.job_id

    def prune(self, order: Order = ALL) -> Pruned:
        return Prune(Housekeeper(self.store.engines), self.storage, order).run(silently)

    def objects(self, prefix: str = "") -> set[str]:
        return {found.key for found in self.storage.list(prefix)}

    def ids(self) -> set[UUID]:
        return {view.id for view in self.store.jobs()}

    def check(self) -> list[JobView]:
        """Whatever a row shows is there."""
        views = self.store.jobs(state=State.succeeded)
        for view in views:
            (image,) = view.images
            assert hashlib.sha256(self.storage.get(image.key)).hexdigest() == image.sha256
        return views


@pytest.fixture(params=["sqlite-dir", "postgres-rclone"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    database, storage = request.param.split("-")
    storage_url = (tmp_path / "s").as_uri() if storage == "dir" else _url(request.getfixturevalue("s3"))
    database_url: str = request.getfixturevalue(f"{database}_url")
    store = Store.open(database_url)
    schema.upgrade(store.engines)
    yield House(store, open_storage(storage_url), database_url, storage_url)
    store.close()


def _url(bucket: Bucket) -> str:
    return bucket.url


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are old at once."""
    monkeypatch.setattr(prune_module, "INPUT_AGE", NOW)


def test_an_old_job_goes_with_all_that_is_its_and_a_young_one_stays(house: House) -> None:
    gone = {house.succeed(batch="old"), house.fail(batch="old")}
    saved = house.claim(house.submit(batch="old"))
    key = f"saved/{saved.job_id}/{saved.token}.safetensors"
    house.storage.put(key, b"rows", "application/octet-stream")
    house.store.cancel(saved.job_id)
    assert house.store.release(saved, saved_key=key)
    gone.add(saved.job_id)
    running, queued = house.claim(house.submit()), house.submit()
    house.upload(running)
    done = house.prune()
    assert (done.jobs, done.objects + done.orphans, done.batches) == (3, 2, 1)
    assert house.ids() == {running.job_id, queued}
    assert house.objects("images/") | house.objects("saved/") == {f"images/{running.job_id}/{running.token}/0.png"}
    kept = house.succeed()
    assert house.prune(replace(ALL, older_than=timedelta(hours=1))).jobs == 0
    assert {view.id for view in house.check()} == {kept}


def test_only_what_was_chosen_goes(house: House) -> None:
    jobs = {(state, batch): getattr(house, state)(batch=batch) for state in ("succeed", "fail") for batch in ("a", "b")}
    assert house.prune(replace(ALL, states=frozenset({State.failed}), batch="a")).jobs == 1
    assert house.ids() == set(jobs.values()) - {jobs["fail", "a"]}
    assert house.prune(replace(ALL, batch="b")).jobs == 2
    assert house.ids() == {jobs["succeed", "a"]}
    assert house.prune(replace(ALL, batch="there is none")).jobs == 0
    with house.store.engines.reader.connect() as connection:
        assert connection.scalars(sa.select(batch_table.c.name)).all() == ["a"]


def test_a_dry_run_counts_the_same_and_removes_nothing(house: House, no_patience: None) -> None:
    house.storage.put(INPUT, b"picture", "image/png")
    house.succeed(init_image=INPUT)
    lost = house.claim(house.submit())
    house.upload(lost)
    house.store.release(lost)
    before = house.objects(), house.ids()
    planned = house.prune(replace(ALL, dry_run=True))
    assert (house.objects(), house.ids()) == before
    assert planned == house.prune()
    assert (planned.jobs, planned.objects, planned.orphans, planned.inputs) == (1, 1, 1, 1)


def test_an_input_goes_with_the_last_job_that_names_it(house: House, no_patience: None) -> None:
    house.storage.put(INPUT, b"picture", "image/png")
    house.succeed(init_image=INPUT)
    last = house.submit(init_image=INPUT)
    assert house.prune().inputs == 0
    assert house.storage.exists(INPUT)
    house.store.cancel(last)
    assert house.prune().inputs == 1
    assert house.objects("inputs/") == set()


def test_an_input_stays_for_an_old_job_that_names_it_and_for_one_that_comes_at_this_moment(
    house: House, no_patience: None
) -> None:
    house.storage.put(INPUT, b"picture", "image/png")
    house.succeed(init_image=INPUT)
    old = house.submit(init_image=INPUT)
    with house.store.engines.writer.begin() as connection:
        connection.execute(sa.update(job_table).where(job_table.c.id == old).values(created_at=db_now(-7200)))
    assert house.prune().inputs == 0
    house.store.cancel(old)

    class Late(Housekeeper):
        """A job is submitted when all jobs have been looked at, and no object has been deleted."""

        def inputs_named(self, after: UUID | None, limit: int) -> tuple[dict[UUID, frozenset[str]], UUID | None]:
            named, last = super().inputs_named(after, limit)
            if last is None:
                house.submit(init_image=INPUT)
            return named, last

    assert Prune(Late(house.store.engines), house.storage, ALL).run(silently).inputs == 0
    assert house.storage.exists(INPUT)


def test_a_job_that_was_brought_back_since_it_was_looked_at_stays(house: House) -> None:
    keeper, back, gone = Housekeeper(house.store.engines), house.fail(), house.fail()
    old = Filter(keeper.now(), ALL.states)
    assert {each.id for each in keeper.going(old, None, 10)} == {back, gone}
    house.store.retry(back)
    assert keeper.remove([back, gone], old) == {gone}
    assert house.ids() == {back}


def test_an_input_that_was_stored_of_late_waits_for_its_job(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.storage.put(INPUT, b"picture", "image/png")
    house.succeed(init_image=INPUT)
    assert (house.prune().inputs, house.prune().inputs) == (0, 0)
    assert house.storage.exists(INPUT)
    assert house.objects("prune/")  # remembered, although no row names it any more
    monkeypatch.setattr(prune_module, "INPUT_AGE", NOW)
    assert house.prune().inputs == 1
    assert house.objects() == set()


def test_an_orphan_goes_and_what_a_claim_that_lives_has_put_stays(house: House) -> None:
    lost, living = house.claim(house.submit()), house.claim(house.submit())
    for claim in (lost, living):
        house.upload(claim)
        house.storage.put(f"saved/{claim.job_id}/{claim.token}.safetensors", b"rows", "application/octet-stream")
    house.store.release(lost)
    again = house.claim(lost.job_id)
    output = house.upload(again)
    assert house.prune(replace(ALL, older_than=timedelta(days=1), orphans_older_than=timedelta(hours=1))).orphans == 0
    assert house.prune().orphans == 2
    assert {owner_of(key) for key in house.objects()} == {(c.job_id, c.token) for c in (living, again)}
    assert house.store.finish(again, [output])
    assert [view.id for view in house.check()] == [lost.job_id]


def test_a_probe_goes_when_it_can_be_no_living_runs(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.storage.put("images/probe-of-a-process", b"x", "image/png")
    assert house.prune().orphans == 0
    monkeypatch.setattr(prune_module, "PROBE_AGE", NOW)
    assert house.prune().orphans == 1
    assert house.objects() == set()


def test_what_this_database_never_heard_of_stays_unless_it_is_ordered(house: House, no_patience: None) -> None:
    gallery = f"images/{uuid4()}/{uuid4()}/0.png"
    for key in (gallery, INPUT, "images/mine.png"):
        house.storage.put(key, b"x", "image/png")
    assert house.prune().unknown == 1
    assert house.objects() == {gallery, INPUT, "images/mine.png"}
    done = house.prune(replace(ALL, unknown=True))
    assert (done.unknown, done.inputs) == (1, 1)
    assert house.objects() == {"images/mine.png"}


@pytest.mark.parametrize("place", ["after_prune_note", "after_prune_rows"])
def test_a_prune_that_is_killed_loses_nothing_and_the_next_one_goes_on(
    house: House, no_patience: None, place: str
) -> None:
    house.storage.put(INPUT, b"picture", "image/png")
    for _ in range(3):
        house.succeed(batch="old", init_image=INPUT)
    kept = house.succeed(batch="new")
    code = (
        "import sys; from datetime import timedelta; from jobs.prune import *; from jobs.store import Store\n"
        "from jobs.storage import open_storage; from jobs.store_prune import Housekeeper; import jobs.prune as p\n"
        "p.INPUT_AGE = timedelta(0)\n"
        "order = Order(timedelta(0), batch='old', orphans_older_than=timedelta(0))\n"
        "Prune(Housekeeper(Store.open(sys.argv[1]).engines), open_storage(sys.argv[2]), order).run(silently)"
    )
    child = [sys.executable, "-c", code, house.database_url, house.storage_url]
    killed = subprocess.run(child, env={**os.environ, "NIGHTSHIFT_FAILPOINT": f"{place}:kill9"}, timeout=60)
    assert killed.returncode == -9
    assert len(house.check()) == (4 if place == "after_prune_note" else 1)
    for _ in range(2):
        house.prune(replace(ALL, batch="old"))
    assert [view.id for view in house.check()] == [kept]
    assert {owner_of(key) for key in house.objects()} - {None} == {owner_of(house.store.get(kept).images[0].key)}
    assert house.objects("inputs/") == set()


def test_workers_and_two_prunes_beside_each_other_lose_no_visible_picture(house: House) -> None:
    rng, stop, errors = random.Random(4), threading.Event(), list[BaseException]()
    keep = set[UUID]()

    def prune_again_and_again() -> None:
        while not stop.is_set():
            house.prune(replace(ALL, batch="old", unknown=True))

    def work(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(25):
            batch = dice.choice(["old", "new"])
            claim = house.claim(house.submit(batch=batch))
            output = house.upload(claim)
            if dice.random() < 0.3:  # a worker that lost its lease and leaves its object behind
                house.store.release(claim)
                claim = house.claim(claim.job_id)
                output = house.upload(claim)
            assert house.store.finish(claim, [output])
            keep.update({claim.job_id} if batch == "new" else ())

    def guarded(target: object, *args: object) -> None:
        try:
            target(*args)  # type: ignore[operator]
        except BaseException as error:
            errors.append(error)
            stop.set()

    prunes = [threading.Thread(target=guarded, args=(prune_again_and_again,)) for _ in range(2)]
    workers = [threading.Thread(target=guarded, args=(work, rng.random())) for _ in range(3)]
    for thread in (*prunes, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in prunes:
        thread.join()
    assert errors == []
    assert {view.id for view in house.check()} >= keep
    house.prune(replace(ALL, batch="old"))
    # A note is removed at once when nothing need be old, and with it what it knew.
    house.prune(replace(ALL, batch="old", unknown=True))
    assert {view.id for view in house.check()} == keep
    assert len(house.objects("images/")) == len(keep)


def test_a_bite_is_halved_while_the_database_is_busy_and_grows_again() -> None:
    bites, asked = Bites(), list[int]()

    def work(size: int) -> int:
        asked.append(size)
        if size > 300 and len(asked) < 4:
            raise sa.exc.OperationalError("DELETE", {}, Exception("canceling statement due to statement timeout"))
        return size

    assert bites.run(work) == 250
    assert (bites.run(work), bites.run(work)) == (500, 1000)
    assert asked == [1000, 500, 250, 500, 1000]

    def never(size: int) -> int:
        raise sa.exc.OperationalError("DELETE", {}, Exception("database is locked"))

    with pytest.raises(sa.exc.OperationalError):
        bites.run(never)


def test_jobs_beyond_one_bite_go_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_module, "MAX_BITE", 2)
    for _ in range(5):
        house.fail(batch=f"b{_}")
    prune = Prune(Housekeeper(house.store.engines), house.storage, ALL, _bites=Bites(2))
    assert prune.run(silently).jobs == 5
    assert prune.done.batches == 5 and house.ids() == set()


def test_a_batch_that_is_added_to_at_this_moment_is_not_removed(house: House) -> None:
    house.fail(batch="nightly")
    assert house.prune(replace(ALL, states=frozenset({State.cancelled}))).batches == 0
    stop, errors = threading.Event(), list[BaseException]()

    def submit() -> None:
        try:
            for _ in range(40):
                house.store.cancel(house.submit(batch="nightly"))
        except BaseException as error:
            errors.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=submit)
    thread.start()
    while not stop.is_set():
        house.prune()
    thread.join()
    assert errors == []
