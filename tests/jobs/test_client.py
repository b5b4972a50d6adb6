"""The producer's door, on the embedded default, with a stand-in for the worker that uses the store alone."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from PIL import Image

from jobs import Client, InvalidSpec, JobConflict, JobNotFound, JobSpec, Settings, State, StorageError, WaitTimeout
from jobs.storage import open_storage
from jobs.store import Store
from jobs.views import Output


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as opened:
        yield opened


@pytest.fixture
def render(settings: Settings, client: Client) -> Callable[[UUID], bytes]:
    """Does what a worker does to the rows: claims the job, stores a picture, finishes."""
    storage = open_storage(settings.storage_url)

    def work(job_id: UUID) -> bytes:
        store = Store.open(settings.database_url)
        claim = store.claim(job_id, "stand-in")
        assert claim is not None
        data, key = picture(), f"images/{job_id}/{claim.token}/0.png"
        storage.put(key, data, "image/png")
        sha256 = hashlib.sha256(data).hexdigest()
        assert store.finish(claim, [Output(0, key, claim.spec.seed or 0, 64, 64, sha256, len(data))])
        store.close()
        return data

    return work


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_prompt_fields_or_a_spec_may_be_submitted(client: Client) -> None:
    spec = JobSpec(prompt="a", steps=3)
    views = [
        client.submit("a", steps=3),
        client.submit(prompt="a", steps=3),
        client.submit(spec),
        client.submit({"prompt": "a", "steps": 3}),
        client.submit(JobSpec(prompt="a"), steps=3),
    ]
    assert {view.spec.model_copy(update={"seed": None}) for view in views} == {spec}
    assert len({view.id for view in views}) == 5


def test_a_bad_job_among_many_enqueues_none(client: Client) -> None:
    with pytest.raises(InvalidSpec, match="steps"):
        client.submit_many(["fine", {"prompt": "x", "steps": 0}])
    with pytest.raises(InvalidSpec, match="init_image"):
        client.submit_many(["fine", {"prompt": "x", "init_image": b"no picture"}])
    with pytest.raises(InvalidSpec, match="prompt"):
        client.submit()
    assert client.counts()[State.queued] == 0


def test_a_batch_is_counted_listed_and_waited_for(client: Client, render: Callable[[UUID], bytes]) -> None:
    views = client.submit_many(["a", "b", "c"], batch="tonight")
    tonight = client.batch("tonight")
    assert tonight.counts()[State.queued] == 3
    assert tonight.jobs() == views
    render(views[1].id)
    assert [view.id for view in tonight.jobs(state=State.succeeded)] == [views[1].id]
    client.cancel(views[0].id)
    client.cancel(str(views[2].id))
    assert [view.state for view in tonight.wait(timeout=5)] == [State.cancelled, State.succeeded, State.cancelled]


def test_wait_sees_the_end_and_the_picture_is_there(client: Client, render: Callable[[UUID], bytes]) -> None:
    job = client.submit("a", seed=7)
    worker = threading.Thread(target=render, args=[job.id])
    worker.start()
    done = client.wait(job, timeout=60)
    worker.join()
    assert done.state == State.succeeded
    assert done.images[0].seed == 7
    assert client.image_bytes(job.id) == picture()
    assert client.image_url(job.id).endswith("/0.png")


def test_wait_keeps_the_order_and_gives_up_in_time(client: Client, render: Callable[[UUID], bytes]) -> None:
    first, second = client.submit_many(["a", "b"])
    render(second.id)
    with pytest.raises(WaitTimeout, match="1 of 2 jobs"):
        client.wait([second, first], timeout=0.0)
    render(first.id)
    assert [view.id for view in client.wait([second.id, str(first.id), second])] == [second.id, first.id, second.id]
    with pytest.raises(JobNotFound):
        client.wait(uuid4(), timeout=0.0)


def test_an_idempotency_key_gives_the_first_job(client: Client) -> None:
    first = client.submit("a", idempotency_key="order 7")
    assert client.submit("something else", idempotency_key="order 7") == first


def test_an_init_image_travels_by_its_content(client: Client, settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "sketch.png"
    path.write_bytes(picture())
    views = client.submit_many([{"prompt": "x", "init_image": path, "strength": 0.5}] * 3)
    path.unlink()
    keys = {view.spec.input_key for view in views}
    assert keys == {f"inputs/{hashlib.sha256(picture()).hexdigest()}.png"}
    assert open_storage(settings.storage_url).get(str(keys.pop())) == picture()
    assert client.get(views[0].id).spec == views[0].spec
    assert client.submit(views[0].spec).spec == views[0].spec


def test_a_picture_that_changed_is_not_handed_out(
    client: Client, settings: Settings, render: Callable[[UUID], bytes]
) -> None:
    job = client.submit("a")
    with pytest.raises(JobNotFound, match="no image 0"):
        client.image_bytes(job.id)
    render(job.id)
    open_storage(settings.storage_url).put(client.get(job.id).images[0].key, picture("blue"), "image/png")
    with pytest.raises(StorageError, match="sha256"):
        client.image_bytes(job.id)
    with pytest.raises(JobNotFound, match="no image 1"):
        client.image_bytes(job.id, 1)


def test_only_failed_jobs_are_retried(client: Client) -> None:
    job = client.submit("a")
    with pytest.raises(JobConflict):
        client.retry(job.id)
    with pytest.raises(JobNotFound, match="no job id"):
        client.retry("job 7")


def test_two_clients_share_one_queue(client: Client, settings: Settings) -> None:
    job = client.submit("a")
    with Client(settings) as other:
        assert other.get(job.id) == job


def test_a_picture_is_stored_once_for_many_jobs(client: Client, settings: Settings) -> None:
    spec = client.store_input(JobSpec(prompt="x", init_image=picture()))
    assert spec == client.store_input(JobSpec(prompt="x", init_image=picture()))
    assert len(list((settings.home / "storage" / "inputs").iterdir())) == 1


@pytest.mark.parametrize("one", ["star", {"prompt": "star"}, JobSpec(prompt="star")])
def test_one_spec_is_not_taken_for_many(client: Client, one: Any) -> None:
    with pytest.raises(InvalidSpec, match="give a list"):
        client.submit_many(one)
    assert not any(client.counts().values())


def test_what_is_no_spec_no_name_and_no_id_is_told_in_a_sentence(client: Client) -> None:
    wrong: Any = 5
    with pytest.raises(InvalidSpec, match="spec: is int"):
        client.submit(wrong)
    with pytest.raises(InvalidSpec, match="batch: '5' is not allowed"):
        client.submit_many(["a"], batch=wrong)
    with pytest.raises(JobNotFound, match="'5' is no job id"):
        client.get(wrong)


def test_a_job_itself_is_as_good_as_its_id(client: Client) -> None:
    job = client.submit("a")
    with pytest.raises(JobNotFound, match=f"job {job.id} has no image 0"):
        client.image_bytes(job)
    assert client.cancel(client.get(job)) == State.cancelled


def test_a_database_error_does_not_tell_the_prompt(client: Client) -> None:
    engines = Store.open(client.settings.database_url).engines
    with engines.writer.begin() as connection:
        connection.execute(sa.text("ALTER TABLE job RENAME TO elsewhere"))
    engines.dispose()
    with pytest.raises(sa.exc.OperationalError) as caught:
        client.submit("a secret castle")
    assert "secret" not in str(caught.value)
