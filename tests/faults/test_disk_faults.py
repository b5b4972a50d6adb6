"""Disks that are full and objects that somebody deleted: rows 30 and 52."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import sqlalchemy as sa

from jobs.errors import StorageError
from jobs.states import State
from tests.faults.checker import check, keys_in
from tests.faults.harness import Night, Worker
from tests.faults.lanes import Place, only

CONCURRENCY = 8
KEPT = 3 * CONCURRENCY
LEASES = {"lease_s": 4.0, "beat_s": 0.5}


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own of that size, mounted there."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(folder: Path, size_bytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(folder)], check=True)


def storage_folder(night: Night) -> Path:
    return Path(unquote(urlsplit(night.settings.storage_url).path))


def check_sound(night: Night) -> None:
    with closing(sqlite3.connect(str(night.store.engines.writer.url.database))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@only("embedded")
def test_row_30_a_full_storage_is_waited_for_and_shows_no_half_picture(night: Night) -> None:
    """no room left for pictures"""
    with small_disk(storage_folder(night), 20 * 4096) as folder:
        worker = night.worker(concurrency=CONCURRENCY, **LEASES).ready()
        night.submit(KEPT + 40)
        night.wait_until(lambda: "No space left" in night.log_text(), "a full disk")
        time.sleep(1.25 * worker.options["lease_s"])
        stored, views = set(keys_in(night)), night.views().values()
        shown = {image.key for view in views for image in view.images}
        assert shown == stored, "half a picture is in sight, or one is shown that is not there"
        assert not any(view.suspect or view.attempts > 1 or view.state is State.failed for view in views)
        grow(folder, 2**22)
        night.wait_ended()
        worker.stop()
        print(check(night, duplicates=0, orphans=0))


@only("embedded")
def test_row_30_a_put_that_fails_half_way_is_done_again(night: Night) -> None:
    """writing a picture fails half way"""
    night.submit(24)
    # Not the first: a worker that cannot store at all does not begin.
    draws = next(seed for seed in itertools.count(1000 * night.seed) if random.Random(seed).random() > 0.4)
    worker = night.worker(failpoint=f"half_put:raise@p=0.4,seed={draws}", **LEASES).ready()
    night.wait_ended()
    worker.stop()
    assert not any(key.endswith(".part") for key in keys_in(night))
    print(check(night, duplicates=0, orphans=0))


@only("embedded")
def test_row_30_a_database_that_may_not_grow_costs_nobody_anything(night: Night) -> None:
    """no room left for the database, for one worker (RLIMIT_FSIZE)"""
    night.submit(60, steps=20)
    worker = night.worker(step_s=0.01, **LEASES).ready()
    night.wait_running(CONCURRENCY)
    full_s = night.turn((0.5, 6.0))
    log = Path(f"{night.store.engines.writer.url.database}-wal")
    limit(worker, log.stat().st_size)
    time.sleep(full_s)
    limit(worker, resource.RLIM_INFINITY)
    left = [view for view in night.views().values() if not view.ended]
    assert left, "all was over before"
    night.wait_ended()
    worker.stop()
    check_sound(night)
    print(check(night, duplicates=0 if full_s < 1 else KEPT, orphans=0 if full_s < 1 else KEPT))


def limit(worker: Worker, size_bytes: int) -> None:
    """No file of this process may grow beyond that from now on."""
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


@pytest.fixture
def crowded(place: Place, seed: int, tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Night]:
    """A night whose database is on a small disk of its own."""
    # Room for SQLite's log too, which has 4 MB before it is used anew.
    with small_disk(tmp_path / "disk", 2**24) as disk:
        file = shutil.copy(place.settings.database_url.removeprefix("sqlite:///"), disk)
        settings = place.settings.model_copy(update={"database_url": f"sqlite:///{file}"})
        place = dataclasses.replace(place, settings=settings)
        with Night(place, seed, tmp_path, acks_late=bool(pytestconfig.getoption("--acks-late"))) as begun:
            yield begun


@only("embedded")
def test_row_30_a_full_disk_under_the_database_loses_nothing(crowded: Night) -> None:
    """no room left for the database, for everybody"""
    night = crowded
    night.submit(40, steps=20)
    worker = night.worker(step_s=0.01, **LEASES).ready()
    night.wait_running(CONCURRENCY)
    ballast = night.folder / "disk" / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 2**14)
    with pytest.raises(sa.exc.OperationalError, match="full"):
        for number in range(200):
            night.client.submit(f"too late {number} " + "x" * 1500)
    time.sleep(night.rng.uniform(0.0, 2.0 * LEASES["lease_s"]))
    ballast.unlink()
    night.adopt()
    night.wait_ended()
    worker.stop()
    check_sound(night)
    print(check(night, duplicates=KEPT, orphans=KEPT))


@pytest.mark.fault_slice
def test_row_52_a_picture_deleted_by_hand_is_missed_and_drawn_again(night: Night) -> None:
    """a stored picture deleted by hand"""
    night.submit(16, images=2)
    worker = night.worker(**LEASES).ready()
    ended = night.wait_ended()
    storage = night.storage
    lost = night.rng.sample(list(ended.values()), 3)
    for view in lost:
        storage.delete(view.images[night.rng.randrange(2)].key)
    damage = night.client.check_images()
    assert {each.job_id for each in damage} == {view.id for view in lost} and len(damage) == len(lost)
    for each in damage:
        with pytest.raises(StorageError, match="nightshift repair"):
            night.client.image_bytes(each.job_id, each.index)
    assert sorted(night.client.repair(damage)) == sorted(view.id for view in lost)
    for view in lost:  # a person's order is the one thing that changes what has ended
        del night.ended[view.id]
    night.wait_ended()
    worker.stop()
    assert night.client.check_images() == []
    # The sisters of the lost pictures have no row any more; `nightshift prune` removes them.
    print(check(night, duplicates=2 * len(lost), orphans=len(lost)))
