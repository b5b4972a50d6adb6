"""A job that somebody waits for, through a real worker that is full of others; with a broker and without one."""

from pathlib import Path

import pytest

from jobs import Client, Settings, State, schema
from jobs.store import Store
from tests.conftest import Bucket
from tests.integration.processes import PATIENCE_S, fake_worker, wait_until

# A bulk job lasts for minutes, and the lookout's next look too: longer than this test waits for anything.
BULK_STEPS, STEP_S, SLOTS = 1000, 0.3, 2
LOOKOUT_S = 3600.0


@pytest.fixture
def embedded(settings: Settings) -> Settings:
    settings.make_home()
    return settings


@pytest.fixture
def production(tmp_path: Path, redis_url: str, postgres_url: str, s3: Bucket) -> Settings:
    return Settings(home=tmp_path / "home", database_url=postgres_url, broker_url=redis_url, storage_url=s3.url)


@pytest.mark.parametrize("lane", ["embedded", "production"])
def test_an_urgent_job_is_drawn_while_bulk_jobs_fill_every_slot(
    lane: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    settings: Settings = request.getfixturevalue(lane)
    store = Store.open(settings.database_url)
    schema.upgrade(store.engines)
    store.close()
    log = tmp_path / "worker.log"
    bulk = [{"prompt": f"bulk {number}", "steps": BULK_STEPS} for number in range(SLOTS + 3)]
    options = {"concurrency": SLOTS, "grace_s": 3.0, "lookout_s": LOOKOUT_S}
    with Client(settings) as client, fake_worker(settings, log, step_s=STEP_S, **options):
        client.submit_many(bulk, batch="bulk")
        wait_until(lambda: client.counts("bulk")[State.running] == SLOTS, "full slots", log)
        # The first may meet the look of a worker that has just become full: the second is found by its bell alone.
        for name in ("first", "second"):
            wanted = client.submit_many([{"prompt": "a red star", "steps": 2, "priority": 7}], batch=name)
            client.batch(name).wait(PATIENCE_S)
            assert client.get(wanted[0].id).state is State.succeeded
        assert client.counts("bulk") == {**dict.fromkeys(State, 0), State.running: SLOTS, State.queued: 3}
