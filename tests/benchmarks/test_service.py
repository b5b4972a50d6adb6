"""The benchmark of the service: each lane is compared with the engine's run beside it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.service import account, goals, result_name
from benchmarks.service_turns import Run, Stretch, Turn, draw_by_turns, run_of
from benchmarks.service_ways import jobs_of
from jobs.spec import read_spec
from sd_engine import Request


def test_both_sides_take_the_same_jobs() -> None:
    for job in jobs_of(20, 4, 96, 5, "sd15"):
        spec, request = read_spec(job), Request(**job)
        assert spec.model == request.model == "sd15"
        assert (spec.prompt, spec.seed, spec.steps) == (request.prompt, request.seed, request.steps)
        assert spec.guidance == request.guidance
        assert spec.sampler == request.sampler


def test_another_model_or_dtype_has_a_file_of_its_own() -> None:
    named = [result_name(*what) for what in (("shipped", "fp32"), ("shipped", "bf16"), ("sd15", "bf16"))]
    assert named == ["service.json", "service_bf16.json", "service_sd15_bf16.json"]


def test_a_round_is_compared_with_the_round_beside_it() -> None:
    told = account(
        {
            "engine alone": [Run(10.0, 10.0), Run(20.0, 20.0), Run(12.0, 12.0)],
            "engine again": [Run(10.0, 10.0), Run(25.0, 20.0), Run(12.0, 12.0)],
            "embedded": [Run(10.0, 10.5), Run(20.0, 20.5), Run(12.0, 12.5)],
            "production": [Run(12.5, 11.0, 1.0, 0.1), Run(25.0, 21.0, 1.0, 0.1), Run(15.0, 13.0, 1.0, 0.1)],
        },
        100,
    )
    assert told["embedded"]["efficiency"]["median"] == 1.0
    assert told["engine_again"] == {"median": 1.0, "least": 0.8, "most": 1.0, "count": 3}
    assert told["production"]["efficiency"] == {"median": 0.8, "least": 0.8, "most": 0.8, "count": 3}
    assert told["production"]["servers_cpu_ms_per_job"] == 10.0
    assert told["production"]["worker_cpu_besides_engine_ms_per_job"] == 10.0
    assert told["production"]["first_claim_ms"] == 100.0
    assert told["engine_ms_per_job"] == 120.0
    embedded, production = goals({"96 x 96, engine with 1 threads": told})
    assert embedded.passed
    assert not production.passed
    assert "30.0 ms a job are lost" in production.why


def test_a_run_counts_what_lies_in_the_turns_of_its_way() -> None:
    turns = [Turn(10.0, 11.0, 0.25), Turn(13.0, 14.0, 0.5), Turn(16.0, 17.0)]
    run = run_of(turns, Stretch(began=10.25, first_claim=13.5, ended=16.5), 2.0)
    assert run == Run(wall_s=0.75 + 1.0 + 0.5, own_cpu_s=2.0, servers_cpu_s=0.75, first_claim_s=0.75 + 0.5)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class FakeWay:
    """A process that waits; ends after so many turns, and remembers which processes stood still when it began."""

    def __init__(self, pid: int, turns: int, everybody: list[int], fails: bool = False) -> None:
        self.pid, self._left, self._everybody, self._fails = pid, turns, everybody, fails
        self.stood_still: list[int] = []
        self.began = 0.0

    def begin(self, jobs: Sequence[Mapping[str, Any]]) -> None:
        assert not self._fails
        self.began = time.time()
        self.stood_still = [pid for pid in self._everybody if state_of(pid) == "T"]

    def ended(self) -> Stretch | None:
        self._left -= 1
        return None if self._left else Stretch(self.began, self.began, time.time())


@pytest.fixture
def pids() -> Iterator[list[int]]:
    children = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    yield [child.pid for child in children]
    for child in children:
        child.kill()
        child.wait()


def test_a_way_draws_while_the_others_stand_still(pids: list[int]) -> None:
    short, long = FakeWay(pids[0], 1, pids), FakeWay(pids[1], 3, pids)
    runs = draw_by_turns({"short": short, "long": long}, [{}], 0.01, lambda _: 0.0, lambda: 0.0)
    assert (short.stood_still, long.stood_still) == ([pids[1]], [pids[0]])
    assert 0 < runs["short"].wall_s < runs["long"].wall_s
    assert "T" not in [state_of(pid) for pid in pids]


def test_all_ways_go_on_after_one_has_failed(pids: list[int]) -> None:
    ways = {"good": FakeWay(pids[0], 3, pids), "bad": FakeWay(pids[1], 3, pids, fails=True)}
    with pytest.raises(AssertionError):
        draw_by_turns(ways, [{}], 0.01, lambda _: 0.0, lambda: 0.0)
    assert "T" not in [state_of(pid) for pid in pids]
