"""The main job through real processes and real servers, with a worker that dies and one that is told to leave."""

import hashlib
import io
import subprocess
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from PIL import Image

from jobs import Client, JobView, Settings, State, schema
from jobs.models import job as job_table
from jobs.storage import open_storage
from jobs.store import Store
from tests.conftest import Bucket
from tests.integration.processes import PATIENCE_S, fake_worker, has_line, process, stop, tail, wait_until

JOBS, STEPS, STEP_S = 24, 60, 0.02
QUICK_LEASES = {"lease_s": 3.0, "beat_s": 0.5, "poll_s": 0.2, "concurrency": 6}
"""A dead worker's jobs come back after 3 s, not 30, so that the test takes seconds."""


@pytest.fixture
def production(tmp_path: Path, redis_url: str, postgres_url: str, s3: Bucket) -> Settings:
    """PostgreSQL, Redis and S3 by settings alone."""
    settings = Settings(home=tmp_path / "home", database_url=postgres_url, broker_url=redis_url, storage_url=s3.url)
    store = Store.open(settings.database_url)
    schema.upgrade(store.engines)
    store.close()
    return settings


def produce(settings: Settings, log: Path, *arguments: object) -> None:
    with process(["-m", "tests.integration.producer", *map(str, arguments)], settings, log) as producer:
        assert producer.wait(PATIENCE_S) == 0, tail(log)


def held_by(store: Store, worker: subprocess.Popen[bytes], state: State) -> int:
    """Jobs in ``state`` whose last claim was this process's."""
    mine = job_table.c.worker_id.like(f"%:{worker.pid}:%")
    with store.engines.reader.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).where(mine, job_table.c.state == state)) or 0


def assert_each_image_is_there_once(jobs: list[JobView], settings: Settings) -> None:
    """Every job has exactly the images it asked for, and every row's object exists with the row's own checksum."""
    storage = open_storage(settings.storage_url)
    keys = [image.key for job in jobs for image in job.images]
    assert len(set(keys)) == len(keys)
    for job in jobs:
        assert [(image.index, image.seed) for image in job.images] == [
            (index, (job.spec.seed or 0) + index) for index in range(job.spec.images)
        ]
        for image in job.images:
            data = storage.get(image.key)
            assert (hashlib.sha256(data).hexdigest(), len(data)) == (image.sha256, image.size_bytes)
            with Image.open(io.BytesIO(data)) as picture:
                assert picture.size == (image.width, image.height) == (64, 64)


def test_every_job_is_done_once_although_a_worker_is_killed_in_the_middle(production: Settings, tmp_path: Path) -> None:
    log = tmp_path / "workers.log"
    with (
        Client(production) as client,
        fake_worker(production, log, step_s=STEP_S, **QUICK_LEASES) as doomed,
        fake_worker(production, log, step_s=STEP_S, **QUICK_LEASES) as survivor,
    ):
        store = Store.open(production.database_url)
        produce(production, log, JOBS, STEPS)
        wait_until(
            lambda: bool(held_by(store, doomed, State.succeeded)) and bool(held_by(store, doomed, State.running)),
            "a worker with finished and running jobs",
            log,
        )
        doomed.kill()
        doomed.wait()
        orphans = held_by(store, doomed, State.running)
        jobs = client.batch("night").wait(PATIENCE_S)
        assert {job.state for job in jobs} == {State.succeeded}, tail(log)
        assert len(jobs) == JOBS
        assert {job.attempts for job in jobs} == {1}, "nobody pays for a worker that was killed"
        assert sum(job.suspect for job in jobs) == orphans, "only the killed worker's jobs were drawn again, alone"
        assert_each_image_is_there_once(jobs, production)
        stop(survivor, log)
        store.close()


def test_a_worker_told_to_leave_finishes_what_fits_and_another_takes_the_rest(
    settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "workers.log"
    with Client(settings) as client:
        short, long = client.submit_many(
            [{"prompt": "short", "seed": 1, "steps": 40}, {"prompt": "long", "seed": 2, "steps": 1000}]
        )
        with fake_worker(settings, log, step_s=0.02, grace_s=8.0, **QUICK_LEASES) as leaving:
            wait_until(
                lambda: {client.get(job.id).state for job in (short, long)} == {State.running}, "two running jobs", log
            )
            for _ in range(5):  # an impatient operator changes nothing
                leaving.terminate()
            assert leaving.wait(8.0 + 5.0) == 0, tail(log)  # the grace time, and slack for a loaded machine
        assert client.get(short.id).state is State.succeeded
        released = client.get(long.id)
        assert (released.state, released.attempts) == (State.queued, 0)
        with fake_worker(settings, log, step_s=0.0, until_empty=True, **QUICK_LEASES) as second:
            assert second.wait(PATIENCE_S) == 0, tail(log)
        done = client.get(long.id)
        assert (done.state, done.attempts) == (State.succeeded, 1)
        assert "Traceback" not in log.read_text()


def test_a_running_job_is_cancelled_within_a_moment(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with Client(settings) as client, fake_worker(settings, log, step_s=0.05, **QUICK_LEASES) as worker:
        job = client.submit("never finished", steps=1000)
        wait_until(lambda: client.get(job.id).state is State.running, "a running job", log)
        client.cancel(job.id)
        assert client.wait(job.id, PATIENCE_S).state is State.cancelled
        stop(worker, log)


def test_garbage_on_the_broker_is_dropped_and_the_worker_goes_on(production: Settings, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with Client(production) as client, fake_worker(production, log, step_s=0.0, **QUICK_LEASES) as worker:
        wait_until(has_line(log, "ready"), "a worker that is ready", log)
        with redis.Redis.from_url(production.broker_url) as broker:
            for garbage in (b"no json", b'{"body": 3}', b"\x80\x04\x95"):
                broker.lpush("nightshift:render.nightshift-mini", garbage)
        job = client.submit("a red star", steps=2)
        assert client.wait(job.id, PATIENCE_S).state is State.succeeded, tail(log)
        stop(worker, log)
