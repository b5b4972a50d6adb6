"""What `benchmarks.cold` says of its processes is what they measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.cold import PEAK, Run, Way, goals, line, start
from benchmarks.cold_files import forget
from sd_engine import shipped_model

WAY = Way("load, fp16 into fp16", "ours", "load", Path("model"), "fp16")
FLOOR = {"look_for_not_finite": 0.1, "convert_to_fp32": 2.0}


def _run(total: float, peak: int = 100) -> Run:
    return Run(total, imports=2.0, call=total, touch=0.0, before=50, peak=peak, drawn_peak=peak, weights=100, read=None)


def test_a_line_has_the_median_with_its_spread_and_the_worst_peak() -> None:
    found = line(WAY, [_run(3.0), _run(1.0, peak=110), _run(2.0)])
    assert found["seconds"] == {"median": 2.0, "least": 1.0, "most": 3.0, "count": 3}
    assert (found["peak_ratio"], found["read_gb"]) == (1.1, None)


@pytest.mark.parametrize(("theirs", "peak", "passed"), [(4.0, 115, [True, True]), (3.9, 116, [False, False])])
def test_the_goals_are_twice_as_fast_and_a_peak_of_little_more_than_the_weights(
    theirs: float, peak: int, passed: list[bool]
) -> None:
    reference = Way(WAY.name, "reference", "load", WAY.path, "fp16")
    found = goals([line(WAY, [_run(2.0, peak)]), line(reference, [_run(theirs, peak=300)])], FLOOR)
    assert [goal.passed for goal in found] == passed
    assert found[1].reached == peak / 100 and PEAK == 1.15
    assert ("0.10 look" in found[0].why) is not passed[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_fresh_process_of_ours_loads_and_tells_how() -> None:
    run = start(Way("first picture", "ours", "load", shipped_model(), "fp32", warm=False))
    assert run.total > run.imports + run.call > 0
    assert run.weights > 40_000_000 and 0 < run.peak < 2 * run.weights


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux to forget")
def test_what_is_forgotten_is_still_there(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"numbers")
    forget(tmp_path)
    assert (tmp_path / "weights").read_bytes() == b"numbers"
