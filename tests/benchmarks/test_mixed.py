"""The night's baselines draw the same pictures as the packer, and its modelled clock adds up."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks import mixed
from benchmarks.nights import Curve, MeteredPacker, ModelClock, drive, modelled_engine, night, p95, staggered
from benchmarks.static_batches import WAYS, StaticPacker, anything, equal, idling
from sd_engine import Engine, Request, load_model
from sd_engine.samplers import step_table
from sd_engine.schedules import NoiseSchedule
from tests.tiny_model import make_tiny_model

UNITS = 4 * 64 * 64
CURVE = Curve(call_s=1.0, row_s=1.0)


def requests(*steps: int, **fields: object) -> list[Request]:
    side = {"width": 512, "height": 512, "guidance": None, "sampler": "euler"}
    return [Request("x", seed=n, steps=n, **(side | fields)) for n in steps]  # type: ignore[arg-type]


def seconds(way: str, asked: list[Request]) -> float:
    """By a clock on which a call of n rows takes n + 1."""
    clock = ModelClock()
    jobs = staggered(random.Random(1), asked, 0.0)
    return drive(modelled_engine(clock, CURVE, UNITS), WAYS[way](UNITS), jobs, clock).seconds


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        # Four rows of 5, 5, 5 and 1 steps, then one of 4 that joins where there is room.
        ("ours, packed", 1 * 5 + 4 * 5),
        ("(a) one by one", 20 * 2),
        ("(b) static, equal jobs", 5 * 4 + 1 * 2 + 4 * 2),
        ("(c) static, waits for the slowest", 5 * 5 + 4 * 2),
        ("(c) but rows that ended leave", 1 * 5 + 4 * 4 + 4 * 2),
    ],
)
def test_a_modelled_night_takes_what_its_calls_take(way: str, expected: float) -> None:
    assert seconds(way, requests(5, 5, 5, 1, 4)) == pytest.approx(expected)


@pytest.mark.parametrize("padded", [True, False])
def test_static_batches_draw_the_pictures_that_packs_draw(padded: bool, tmp_path: Path) -> None:
    """Rows that have ended and stay in their batch are not changed by its further steps."""
    asked = requests(4, 2, width=64, height=64) + requests(3, width=64, height=64, sampler="dpmpp_2m")
    make_tiny_model(tmp_path)
    model = load_model(tmp_path, "cpu", "fp32")
    wanted = Engine(model).render(asked)
    engine = Engine(model)
    engine.packer = StaticPacker(UNITS, anything, padded=padded)
    for ours, theirs in zip(engine.render(asked), wanted, strict=True):
        assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_lines_that_idle_leave_every_slot_as_it_is() -> None:
    table = idling(step_table("dpmpp_2m", NoiseSchedule(), 5, None), 7)
    state = np.arange(5.0)
    for mix in table.mix[5:]:
        np.testing.assert_array_equal(mix @ [state[0], 99.0, *state[1:]], state)
    assert len(table) == 7


def test_only_equal_jobs_share_a_static_batch_of_equal_jobs() -> None:
    asked = [*requests(3, 3), *requests(3, sampler="ddim"), *requests(4), *requests(3, guidance=2.0)]
    clock = ModelClock()
    packer = StaticPacker(8 * UNITS, equal, padded=True)
    drive(modelled_engine(clock, CURVE, UNITS), packer, staggered(random.Random(1), asked, 0.0), clock)
    assert sorted(units // (64 * 64) for units, _, _ in packer.fill.packs) == [1] * 7 + [2] * 6


def test_latency_counts_from_the_arrival() -> None:
    clock = ModelClock()
    jobs = staggered(random.Random(3), requests(2, 2, 2), 100.0)
    outcome = drive(modelled_engine(clock, CURVE, UNITS), MeteredPacker(UNITS), jobs, clock)
    assert outcome.latencies == pytest.approx([4.0, 4.0, 4.0])
    assert outcome.seconds == pytest.approx(jobs[-1].at_s + 4.0)


def test_a_night_is_the_same_for_the_same_seed_and_its_figures_are_fair() -> None:
    first, again = (night(random.Random(7), 50, ((512, 512),)) for _ in range(2))
    assert [(one.seed, one.steps, one.sampler) for one in first] == [
        (one.seed, one.steps, one.sampler) for one in again
    ]
    assert 5 < sum(one.init_image is not None for one in first) < 25
    assert (p95(list(range(1, 101))), p95([4.0])) == (95, 4.0)


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mixed.json"
    assert mixed.main(["--quick", "--jobs", "20", "--measured-jobs", "0", "--out", str(out)]) == 0
    assert "ours, packed" in capsys.readouterr().out
    assert out.exists() and out.with_suffix(".png").exists()
