"""The demo, with a worker process that has the fake engine; `make demo` is the same with the shipped model."""

import json
import sys
from pathlib import Path

from PIL import Image

from jobs import SAMPLERS, Client
from worker.demo import FIRST, FROM_IMAGE, FROM_TEXT, embedded, new_home, run_demo

COMMAND = [sys.executable, "-m", "tests.integration.fake_worker", json.dumps({"concurrency": 8}), "0.0"]


def test_the_demo_ends_with_every_picture_on_one_sheet(tmp_path: Path) -> None:
    said: list[str] = []
    summary = run_demo(tmp_path / "demo", show=said.append, worker_command=COMMAND)
    assert summary.ok, summary.errors
    assert (summary.jobs, summary.images) == (15, 16)
    with Image.open(summary.sheet) as sheet:
        assert sheet.width > 500
    with Client(embedded(tmp_path / "demo")) as client:
        jobs = client.jobs()
        assert len(client.image_bytes(jobs[0].id)) > 0
    assert json.loads(json.dumps(summary.as_dict()))["images"] == 16
    assert str(summary.sheet) in summary.as_text()


def test_the_demo_shows_what_the_engine_can_mix() -> None:
    fields = [choice for _, choice in (FIRST, *FROM_TEXT, *FROM_IMAGE)]
    samplers = {choice.get("sampler", "dpmpp_2m_karras") for choice in fields}
    assert samplers <= set(SAMPLERS) and len(samplers) >= 8
    assert len({choice["steps"] for choice in fields}) >= 5
    assert len({(choice.get("width"), choice.get("height")) for choice in fields}) >= 4
    assert any(choice["guidance"] is None for choice in fields)


def test_two_demos_never_share_a_directory(tmp_path: Path) -> None:
    assert not new_home(tmp_path).exists()
