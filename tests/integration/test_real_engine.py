"""The same way of a job with the real engine: ``nightshift worker`` processes and a tiny random model."""

import io
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import Client, Settings, State
from jobs.store import Store
from sd_engine import Engine, Request, load_model
from tests.integration.processes import PATIENCE_S, has_line, real_worker, stop, tail, wait_until
from tests.integration.test_end_to_end import held_by, produce, production
from tests.tiny_model import make_tiny_model

__all__ = ["production"]  # a fixture
JOBS, STEPS, SIDE = 16, 60, 64
QUICK_LEASES = ("--lease-seconds", "4", "--heartbeat-seconds", "0.5", "--concurrency", "4")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "nightshift-mini"
    make_tiny_model(folder)
    return folder


def with_model(settings: Settings, model: Path) -> Settings:
    return settings.model_copy(update={"models": {"nightshift-mini": model}})


def test_real_workers_share_the_night_and_one_dies_in_the_middle(
    production: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    settings, log = with_model(production, tiny_model), tmp_path / "workers.log"
    with (
        Client(settings) as client,
        closing(Store.open(settings.database_url)) as store,
        real_worker(settings, log, *QUICK_LEASES) as doomed,
        real_worker(settings, log, *QUICK_LEASES) as survivor,
    ):
        wait_until(has_line(log, f":{doomed.pid}:"), "a worker that is ready", log)
        produce(settings, log, JOBS, STEPS)
        wait_until(lambda: held_by(store, doomed, State.running) > 0, "a running job", log)
        doomed.kill()
        doomed.wait()
        jobs = client.batch("night").wait(PATIENCE_S)
        assert {job.state for job in jobs} == {State.succeeded}, tail(log)
        pictures = {
            (image.seed, job.spec.prompt): client.image_bytes(job.id, image.index)
            for job in jobs
            for image in job.images
        }
        assert len(pictures) == sum(job.spec.images for job in jobs)
        stop(survivor, log)


def test_what_arrives_in_storage_is_what_the_engine_draws_alone(
    settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    settings, log = with_model(settings, tiny_model), tmp_path / "worker.log"
    fields = {"prompt": "a red star", "seed": 11, "steps": 4, "width": SIDE, "height": SIDE, "guidance": 4.0}
    with Client(settings) as client:
        job, *_ = client.submit_many([fields, fields | {"seed": 12}, fields | {"seed": 13, "sampler": "ddim"}])
        with real_worker(settings, log, "--until-empty") as worker:
            assert worker.wait(PATIENCE_S) == 0, tail(log)
        with Image.open(io.BytesIO(client.image_bytes(job.id))) as picture:
            stored = np.asarray(picture).astype(int)
    (alone,) = Engine(load_model(tiny_model)).render([Request(**fields)])  # type: ignore[arg-type]
    # Kernels differ with the number of rows and threads by float32 rounding: a pixel may fall on the other side of .5.
    assert np.abs(stored - alone.astype(int)).max() <= 1
