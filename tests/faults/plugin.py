"""Seeds, lanes and the table of the fault suite; loaded by `tests/conftest.py`, because options must be known early.

Without options only the rows marked `fault_slice` run, with one seed: that is the share of `make test`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
_ROW = re.compile(r"test_row_(\d+)_(\w+)")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "the fault suite, tests/faults")
    group.addoption("--seeds", type=int, metavar="N", help="all rows, each with the seeds 1 to N, on its lanes in turn")
    group.addoption("--seed", type=int, metavar="N", help="all rows, with this one seed, on all their lanes")
    group.addoption("--acks-late", type=int, choices=(0, 1), default=1, help="0: bells are acked when heard")
    group.addoption("--faults-report", type=Path, metavar="PATH", help="write the table there, as JSON")


def seeds(config: pytest.Config) -> Iterable[int]:
    """The seeds of this run."""
    one, many = config.getoption("--seed"), config.getoption("--seeds")
    return [one] if one is not None else range(1, (many or 1) + 1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault_seeds(n): a row that takes long; only so many seeds of `--seeds`")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames and metafunc.definition.path.is_relative_to(FOLDER):
        few = metafunc.definition.get_closest_marker("fault_seeds")
        chosen = list(seeds(metafunc.config))[: few.args[0] if few else None]
        metafunc.parametrize("seed", chosen, ids=lambda seed: f"seed{seed}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A run that is cut short has then seen the first seeds of every row, and not every seed of the first rows.
    items.sort(key=lambda item: int(str(_parameters(item).get("seed", 0))) if _is_row(item) else 0)
    if config.getoption("--seed") is not None:
        return
    every = bool(config.getoption("--seeds"))
    left = [item for item in items if _is_row(item) and not (_is_its_turn(item) and (every or _is_in_slice(item)))]
    if left:
        config.hook.pytest_deselected(items=left)
        gone = set(left)
        items[:] = [item for item in items if item not in gone]


def _is_in_slice(item: pytest.Item) -> bool:
    return item.get_closest_marker("fault_slice") is not None


def _is_its_turn(item: pytest.Item) -> bool:
    """The seeds of a row that runs on both lanes are shared out between them.

    By the parity of the seed's bits, not of the seed: `Night.turn` shares the seeds out too, by their remainder, and
    each choice shall meet both lanes.
    """
    row, given = _ROW.match(item.name), _parameters(item)
    chosen = any(mark.args[0] == "lane" for mark in item.iter_markers("parametrize"))
    if row is None or chosen or "lane" not in given or "seed" not in given:
        return True
    return ((int(row[1]) + int(str(given["seed"])).bit_count()) % 2 == 1) == (given["lane"] == "embedded")


def _is_row(item: pytest.Item) -> bool:
    return item.path.is_relative_to(FOLDER) and "seed" in getattr(item, "fixturenames", ())


def _parameters(item: pytest.Item) -> Mapping[str, object]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterable[None]:
    report = yield
    if item.path.is_relative_to(FOLDER) and (row := _ROW.match(item.name)):
        test = getattr(item, "function", None)
        fault = (getattr(test, "__doc__", None) or row[2].replace("_", " ")).strip().splitlines()[0]
        report.user_properties.append(("row", (int(row[1]), row[2], fault)))  # type: ignore[attr-defined]
    return report


@dataclass(slots=True)
class Row:
    """A line of the table."""

    fault: str
    runs: int = 0
    passed: int = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)


def table(reports: Iterable[pytest.TestReport]) -> dict[tuple[int, str], Row]:
    """A line for each row; a run has passed when its set-up, its call and its end have."""
    rows: dict[tuple[int, str], Row] = {}
    runs: dict[str, list[pytest.TestReport]] = defaultdict(list)
    for report in reports:
        runs[report.nodeid].append(report)
    for nodeid, parts in runs.items():
        known: list[Any] = [value for part in parts for name, value in part.user_properties if name == "row"]
        if not known or any(part.skipped for part in parts):
            continue
        number, promise, fault = known[0]
        row = rows.setdefault((number, promise), Row(fault))
        row.runs += 1
        row.seconds += sum(part.duration for part in parts)
        if all(part.passed for part in parts):
            row.passed += 1
        else:
            row.failed.append(nodeid.rpartition("[")[2].rstrip("]"))
    return dict(sorted(rows.items()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
    ]
    rows = table(reports)
    if not rows:
        return
    terminalreporter.section("fault table")
    for (number, _), row in rows.items():
        failed = f"  FAILED: {', '.join(row.failed)}" if row.failed else ""
        terminalreporter.line(
            f"{number:3}  {row.passed:3}/{row.runs:<3} {row.seconds / row.runs:6.1f} s  {row.fault}{failed}"
        )
    path = config.getoption("--faults-report")
    if path is not None:
        _write(path, rows, config)


def _write(path: Path, rows: dict[tuple[int, str], Row], config: pytest.Config) -> None:
    from benchmarks import report  # torch: not for every run of pytest

    result = {
        "runner": "fake: a step sleeps 2 ms; the rows that name the real engine draw with the shipped model",
        "seeds": list(seeds(config)),
        "acks_late": bool(config.getoption("--acks-late")),
        "rows": [
            {
                "row": number,
                "test": promise,
                "fault": row.fault,
                "passed": row.passed,
                "runs": row.runs,
                "seconds": round(row.seconds / row.runs, 2),
                "failed": row.failed,
            }
            for (number, promise), row in rows.items()
        ],
    }
    report.write(path, result, beside=("celery", "kombu", "redis", "sqlalchemy"))
