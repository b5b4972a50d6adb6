"""An oracle that cannot complain proves nothing: each of its complaints is provoked once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import redis
import sqlalchemy as sa

from jobs import State
from jobs.models import image, job
from tests.faults import checker
from tests.faults.checker import check
from tests.faults.harness import CALM, Night
from tests.faults.lanes import only


@pytest.fixture
def finished(night: Night) -> Night:
    """A night of three jobs, one of them cancelled, in which all went well."""
    night.submit(3, images=2)
    night.client.cancel(night.jobs[2])
    worker = night.worker(**CALM)
    night.wait_ended()
    check(night, cancelled={night.jobs[2].id}, broker=True)
    worker.stop()
    return night


def write(night: Night, table: sa.Table, number: int = 0, **values: Any) -> None:
    """Change the row of that job behind everybody's back."""
    id = table.c.id if table is job else table.c.job_id
    with night.store.engines.writer.begin() as connection:
        connection.execute(sa.update(table).where(id == night.jobs[number].id).values(**values))


def first_key(night: Night) -> str:
    return night.client.get(night.jobs[0]).images[0].key


def swap_pictures(night: Night) -> None:
    """The rows of one job's two pictures name each other's objects, whole and with the right sums."""
    one, other = night.client.get(night.jobs[0]).images
    with night.store.engines.writer.begin() as connection:
        for index, shown in ((0, other), (1, one)):
            mine = sa.and_(image.c.job_id == night.jobs[0].id, image.c.index == index)
            values = {"key": shown.key, "sha256": shown.sha256, "size_bytes": shown.size_bytes}
            connection.execute(sa.update(image).where(mine).values(**values))


def forget_a_picture(night: Night) -> None:
    with night.store.engines.writer.begin() as connection:
        connection.execute(sa.delete(image).where(image.c.job_id == night.jobs[0].id, image.c.index == 1))


def forget_a_job(night: Night) -> None:
    forget_a_picture(night)
    with night.store.engines.writer.begin() as connection:
        connection.execute(sa.delete(image).where(image.c.job_id == night.jobs[0].id))
        connection.execute(sa.delete(job).where(job.c.id == night.jobs[0].id))


def compute_again(night: Night) -> None:
    """The tally's last line once more."""
    with night.tally.open("a") as file:
        file.write(next(line for line in night.tally.read_text().splitlines(True) if line.startswith("drawn")))


def show_what_was_not_drawn(night: Night) -> None:
    drawn = [line for line in night.tally.read_text().splitlines(True) if line.startswith("drawn")]
    night.tally.write_text("".join(drawn[1:]))


def leave_a_half_file(night: Night) -> None:
    path = night.settings.home / "storage" / "images" / ".0123456789abcdef.part"
    path.write_bytes(b"half")


BROKEN: Mapping[str, tuple[str, Callable[[Night], object]]] = MappingProxyType(
    {
        "a job is gone": ("I1: .* is gone", forget_a_job),
        "a job waits": ("I1: .* is queued", lambda night: write(night, job, state=State.queued)),
        "a job failed": ("I1: .* is failed", lambda night: write(night, job, state=State.failed)),
        "a cancelled job was drawn": ("I1: .* is succeeded", lambda night: write(night, job, 2, state="succeeded")),
        "a picture is missing": ("I2: .* shows 1 pictures, not 2", forget_a_picture),
        "an object is missing": (
            "I2: .* is shown and not stored",
            lambda night: night.storage.delete(first_key(night)),
        ),
        "an object is torn": (
            "I2: .* is not what the row says",
            lambda night: night.storage.put(first_key(night), b"torn", "image/png"),
        ),
        "pictures are swapped": ("I2: .* is another picture", swap_pictures),
        "a picture is shown twice": (
            "I2: .* is shown 2 times",
            lambda night: write(night, image, key=first_key(night)),
        ),
        "an end changed": ("I3: .* changed after its end", lambda night: write(night, job, error="changed")),
        "attempts grew": ("I4: .* has 4 attempts", lambda night: write(night, job, attempts=4)),
        "a job paid": ("I4: .* paid for a fault: 2 attempts", lambda night: write(night, job, attempts=2)),
        "a crash was counted": ("I4: .* 1 solo crashes", lambda night: write(night, job, solo_crashes=1)),
        "crashes have no end": ("I4: .* has 4 solo crashes", lambda night: write(night, job, 2, solo_crashes=4)),
        "an orphan": ("I6: 1 objects", lambda night: night.storage.put("images/a/b/0.png", b"", "image/png")),
        "saved rows": ("I6: 1 objects", lambda night: night.storage.put("saved/a/b.safetensors", b"", "image/png")),
        "half a file": ("I6: 1 objects", leave_a_half_file),
        "a lease": ("I7: .* under a lease", lambda night: write(night, job, lease_expires_at=sa.func.now())),
        "computed twice": ("I9: 1 pictures computed again, allowed 0", compute_again),
        "never computed": ("I9: .* was never computed", show_what_was_not_drawn),
    }
)


@pytest.mark.fault_slice
@only("embedded")
def test_the_oracle_complains(finished: Night, subtests: pytest.Subtests) -> None:
    as_it_was = finished.folder / "as it was"
    finished.client.close()
    finished.store.close()
    shutil.copytree(finished.settings.home, as_it_was)
    tally = finished.tally.read_text()
    for broken, (complaint, break_it) in BROKEN.items():
        with subtests.test(broken):
            break_it(finished)
            with pytest.raises(AssertionError, match=complaint):
                check(finished, cancelled={finished.jobs[2].id})
        finished.client.close()
        finished.store.close()
        shutil.rmtree(finished.settings.home)
        shutil.copytree(as_it_was, finished.settings.home)
        finished.tally.write_text(tally)
    assert check(finished, cancelled={finished.jobs[2].id})


@pytest.mark.fault_slice
@only("production")
@pytest.mark.parametrize("key", ["nightshift:render.nightshift-mini", "nightshift:unacked"])
def test_the_oracle_complains_of_bells_that_nobody_answers(
    finished: Night, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "IDLE_S", 0.1)
    with redis.Redis.from_url(finished.settings.broker_url) as broker:
        broker.hset(key, "tag", "bell") if key.endswith("unacked") else broker.lpush(key, "bell")
    with pytest.raises(AssertionError, match=f"I7: the broker still has 1 in {key}"):
        check(finished, cancelled={finished.jobs[2].id}, broker=True)
