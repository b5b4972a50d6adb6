"""The benchmark of the service: each lane is compared with the engine's run beside it."""

from __future__ import annotations

from benchmarks.service import account, goals
from benchmarks.service_slices import Run, Slice, Stretch, run_of
from benchmarks.service_ways import jobs_of
from jobs.spec import read_spec
from sd_engine import Request


def test_both_sides_take_the_same_jobs() -> None:
    for job in jobs_of(20, 4, 96, 5):
        spec, request = read_spec(job), Request(**job)
        assert (spec.prompt, spec.seed, spec.steps) == (request.prompt, request.seed, request.steps)
        assert spec.guidance == request.guidance
        assert spec.sampler == request.sampler


def test_a_round_is_compared_with_the_round_beside_it() -> None:
    told = account(
        {
            "engine alone": [Run(10.0, 10.0), Run(20.0, 20.0), Run(12.0, 12.0)],
            "embedded": [Run(10.0, 10.5), Run(20.0, 20.5), Run(12.0, 12.5)],
            "production": [Run(12.5, 11.0, 1.0, 0.1), Run(25.0, 21.0, 1.0, 0.1), Run(15.0, 13.0, 1.0, 0.1)],
        },
        100,
    )
    assert told["embedded"]["efficiency"]["median"] == 1.0
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
    slices = [Slice(10.0, 11.0, 0.75, 0.25), Slice(13.0, 14.0, 0.75, 0.5), Slice(16.0, 17.0, 0.5, 0.0)]
    run = run_of(slices, Stretch(began=10.25, first_claim=13.5, ended=16.5))
    assert run == Run(wall_s=0.75 + 1.0 + 0.5, own_cpu_s=2.0, servers_cpu_s=0.75, first_claim_s=0.75 + 0.5)
