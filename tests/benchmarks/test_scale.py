"""The benchmark of fleets: a rate counts parts of jobs, and the simulation agrees with what can be computed by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from benchmarks.scale import efficiency, prices
from benchmarks.scale_fleet import steady_rate
from benchmarks.scale_simulation import House, Prices, Simulation, limits, simulate
from tests.faults.fake_runner import Entry

STATEMENTS = {
    "claim": 1.0,
    "finish": 1.0,
    "heartbeat": 1.0,
    "cancel_poll": 1.0,
    "sweep": 1.0,
    "due": 1.0,
    "lookout": 2.0,
}
PRICES = Prices(STATEMENTS, other_ms=0.0, redis_ms=0.1, connections=4.0, broker_clients=5.0)


def entries(what: str, moments: Sequence[tuple[int, float]]) -> list[Entry]:
    return [Entry(what, f"job {number}", 0, pid, at_s, 0) for number, (pid, at_s) in enumerate(moments)]


def test_a_fleet_whose_workers_are_never_idle_draws_what_each_draws_alone() -> None:
    began = [(pid, 0.3 * pid + 2.0 * turn) for pid in range(3) for turn in range(5)]
    drawn = [(pid, at_s + 2.0) for pid, at_s in began]
    assert steady_rate(entries("began", began), entries("drawn", drawn), 3) == pytest.approx(1.5)


def test_what_waits_at_the_start_and_at_the_end_does_not_count() -> None:
    began = [(1, 0.0), (1, 1.0), (2, 1.0), (1, 2.0), (2, 2.0), (1, 3.0)]  # the second came late, and left early
    drawn = [(pid, at_s + 1.0) for pid, at_s in began]
    assert steady_rate(entries("began", began), entries("drawn", drawn), 2) == pytest.approx(2.0)


def test_efficiency_is_over_as_many_workers_alone() -> None:
    rows = [{"workers": 1, "jobs_per_s": 2.0}, {"workers": 4, "jobs_per_s": 6.0}]
    assert efficiency(rows) == [(1, 1.0), (4, 0.75)]


def test_what_the_statements_do_not_explain_of_a_job_is_a_price_too() -> None:
    row = {
        "postgres_ms_per_job": 3.5,
        "redis_ms_per_job": 0.2,
        "connections_per_worker": 6.0,
        "broker_clients_per_worker": 5.0,
        "worker_s_per_job": 0.5,
    }
    # Its claim and its finish take 2 ms, what is asked by the clock 2.5 ms a second.
    alone = {"workers": 1, "worker_s_per_job": 2.0, "redis_ms_per_job": 4.2}
    slow = row | {"postgres_ms_per_job": 12.25, "worker_s_per_job": 2.0, "redis_ms_per_job": 0.8, "workers": 11}
    paid = prices({"statements_ms": STATEMENTS, "cpu": [row], "gpu": [alone, slow]})
    assert paid.other_ms == 0.25
    # Of 12.25 ms 2.25 are the job's: 10 in two seconds, in which what is asked by the clock is priced at 5.
    assert paid.rarely == 2.0 and paid.clock_ms == 5.0
    # Half a job a second each: besides their jobs eleven cost Redis 3.3 ms a second, one 2, most of that its own.
    assert (paid.redis_clock_ms, paid.redis_ms) == (0.13, 0.2)


def test_what_is_asked_rarely_costs_the_database_more() -> None:
    (outcome,) = simulate(House(replace(PRICES, rarely=3.0), pack=2, database_cores=1), [50])
    assert outcome.database_busy == pytest.approx(50 * (2.0 + 3 * 2.5) * 1e-3, rel=0.15)


def test_what_every_worker_asks_redis_by_the_clock_is_work_of_redis() -> None:
    (outcome,) = simulate(House(replace(PRICES, redis_clock_ms=0.5), pack=2, database_cores=1), [50])
    assert outcome.broker_busy == pytest.approx(50 * (0.1 + 0.5) * 1e-3, rel=0.15)


def test_the_part_with_the_least_room_ends_first() -> None:
    ends = limits(House(PRICES, max_connections=103, database_cores=8))
    assert ends["PostgreSQL's connections"] == 25
    # 2 ms a job and 2.5 ms by the clock, a second
    assert ends["PostgreSQL's cores"] == int(8000 / 4.5)
    assert min(ends, key=lambda name: ends[name]) == "PostgreSQL's connections"


def test_a_database_with_room_keeps_every_gpu_busy_and_works_as_much_as_its_prices_say() -> None:
    (outcome,) = simulate(House(PRICES, pack=2, database_cores=1), [50])
    assert outcome.efficiency == pytest.approx(1.0, abs=0.1)
    assert outcome.database_busy == pytest.approx(50 * 4.5e-3, rel=0.15)


def test_a_database_without_room_draws_what_it_can_answer() -> None:
    house = House(PRICES, pack=2, jobs_per_s=10.0, database_cores=1)
    (outcome,) = simulate(house, [100])
    assert outcome.database_busy > 0.95
    # A core answers 1,000 ms of statements a second; the clock's statements wait with the others.
    assert outcome.efficiency == pytest.approx(0.5, abs=0.12)
    assert outcome.claim_late_s > 0.1


def test_the_same_seed_makes_the_same_fleet() -> None:
    first, second = (Simulation(House(PRICES), 5, random.Random(3)).run(4.0, 8.0) for _ in range(2))
    assert first == second
