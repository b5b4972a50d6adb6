"""The benchmark of submits: its rows are good, its rivals' are as wide as ours, and its arithmetic holds."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks import submit
from benchmarks.submit import COLUMNS, Bench, Run, bulk, goals, night
from jobs.models import job
from jobs.spec import read_spec
from tests import servers


def test_every_row_of_the_night_is_a_spec_and_no_two_are_alike() -> None:
    specs = [read_spec(row) for row in night(40)]
    assert len(set(specs)) == 40
    assert sum(spec.seed is None for spec in specs) == 20


def test_the_rows_of_the_rivals_have_the_columns_that_ours_have() -> None:
    required = {column.name for column in job.c if not column.nullable and column.server_default is None}
    assert required <= set(COLUMNS)
    assert all(name in job.c for name in COLUMNS)


def test_goals_are_judged_by_the_medians() -> None:
    stage = {"median": 0.25, "least": 0.1, "most": 0.3, "count": 3}
    result = {
        "rows_per_s": {"sqlite_and_bell": stage | {"median": 12_000}, "postgresql_and_bell": stage | {"median": 9_000}},
        "bell_adds": {"sqlite": stage, "postgresql": stage | {"median": 0.1}},
    }
    assert [goal.passed for goal in goals(result)] == [True, False, False, True]


def test_a_run_that_did_not_insert_every_row_is_no_measurement(tmp_path: Path) -> None:
    with ExitStack() as stack:
        try:
            bench = Bench(tmp_path, stack, 20)
        except servers.MissingServer as missing:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(str(missing))
        assert bulk(bench, "sqlite", bench.redis).bell_s > 0
        bench.rows = 21
        with pytest.raises(AssertionError):
            bulk(bench, "sqlite", "memory://")


def test_a_stage_is_what_it_took_for_one_row() -> None:
    told = submit._stages([Run(2.0, 1.0, 0.5, 0.25)], 1000)
    assert {stage: value["median"] for stage, value in told.items()} == {
        "read": 1000.0,
        "store": 500.0,
        "bell": 250.0,
        "total": 2000.0,
    }
