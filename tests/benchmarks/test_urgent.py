"""The benchmark of those who wait: its arithmetic, and that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import urgent
from benchmarks.nights import SIZES, Curve, ModelClock, modelled_engine
from benchmarks.urgent_worker import URGENT


def machine() -> urgent.Machine:
    clock = ModelClock()
    units = 16 * 64 * 64
    return urgent.Machine(lambda: modelled_engine(clock, Curve(0.012, 0.003), units), clock, units, SIZES)


def test_an_urgent_job_waits_for_the_running_step_and_no_other() -> None:
    """Twenty steps of 12 + 2 x 3 ms, and at most one of a full pack (60 ms) before them."""
    found = urgent.latencies(machine(), 1, {URGENT: 20})
    assert found["idle"] == pytest.approx([20 * 0.018] * 20)
    assert all(0.36 <= latency <= 0.36 + 0.06 + 1e-9 for latency in found[URGENT])


def test_a_job_that_is_not_urgent_waits_for_its_place() -> None:
    found = urgent.figures(urgent.latencies(machine(), 1, {URGENT: 5, urgent.PLAIN: 5}))
    assert found[urgent.PLAIN]["median_x_idle"] > 2 * found[URGENT]["median_x_idle"]
    assert urgent.goal(found).passed


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "urgent.json"
    assert urgent.main(["--samples", "2", "--measured", "0", "--service", "0", "--out", str(out)]) == 0
    assert "ours, urgent" in capsys.readouterr().out
    assert out.exists() and out.with_suffix(".png").exists()
