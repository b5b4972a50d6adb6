"""`python -m tests.faults.mutate [NAME ...]`: break our own code in one way after the other, and see who notices.

Prints a table, mutation -> tests that failed; exit code 1 when a mutation was noticed by none of the rows that are
meant to. `--report PATH` writes it as JSON.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from xml.etree import ElementTree

from benchmarks import report
from tests.faults.mutating import VARIABLE
from tests.faults.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
LOOKED_AT = (
    "tests/faults",
    "tests/jobs/test_store.py",
    "tests/jobs/test_store_machine.py",
    "tests/jobs/test_concurrency.py",
)
LIMIT_S = 1800.0
#: Each names the tests (`pytest -k`) that are meant to notice.
MEANT: Mapping[str, str] = MappingProxyType(
    {
        "no_fencing": "row_12 or fenced_out or store_does_what_the_model_does or every_interleaving",
        "attempt_counted_late": "row_01_a_worker_killed or counts_the_attempt or store_does_what_the_model_does",
        "crash_counted_late": "row_37 or poison_job_fails or store_does_what_the_model_does",
        "suspects_in_company": "row_37 or claimed_alone or store_does_what_the_model_does",
        "no_vouching": "row_12 or takes_the_suspicion_back or store_does_what_the_model_does",
        "cancel_overwritten": "row_41 or cancelled_by_its_worker or every_interleaving",
        "sweep_in_steps": "every_interleaving",
        "worker_clock": "row_44 or databases_clock",
        "begin_deferred": "row_28 or row_29 or reads_before_it_writes",
        "no_sweeper": "row_01_a_worker_killed or row_04",
        "no_ringer": "row_05 or row_18",
        "uncapped_ringer": "row_50",
        "early_ack": "row_03 or row_04",
        "early_ack_and_no_ringer": "row_04",
        "duplicates_rejected": "row_21",
        "swapped_slots": "row_01_a_worker_killed or row_07",
        "saved_rows_ignored": "row_08",
    }
)
#: What only a lane with a broker can show; all others are looked at on the embedded lane, which is quicker.
NEED_A_BROKER = frozenset(
    {"no_ringer", "uncapped_ringer", "early_ack", "early_ack_and_no_ringer", "duplicates_rejected"}
)
#: A broker that forgets at once is one that the promise holds with: nobody should notice.
HARMLESS = frozenset({"early_ack"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the tests that were run said of a mutation."""

    mutation: str
    caught: tuple[str, ...]
    runs: int
    seconds: float

    @property
    def as_promised(self) -> bool:
        """Noticed, or rightly not."""
        return self.runs > 0 and bool(self.caught) != (self.mutation in HARMLESS)

    @property
    def line(self) -> str:
        """A line of the table."""
        noticed = ", ".join(self.caught) or ("nobody, as it must be" if self.as_promised else "NOBODY")
        return f"{self.mutation:24} {self.seconds:5.0f} s  {noticed}"


def judge(mutation: str) -> Verdict:
    """Run the tests that are meant to notice."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nightshift-mutation-") as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.faults.mutating", "-p", "no:cacheprovider"]
        left_out = "embedded" if mutation in NEED_A_BROKER else "production"
        chosen = f"({MEANT[mutation]}) and not {left_out}"
        command += ["--seed", "1", f"--junit-xml={results}", "-k", chosen, *LOOKED_AT]
        process = subprocess.run(
            command, cwd=ROOT, env={**os.environ, VARIABLE: mutation}, capture_output=True, text=True, timeout=LIMIT_S
        )
        if process.returncode not in (0, 1):
            raise RuntimeError(
                f"the tests of {mutation} did not run:\n{process.stdout[-3000:]}{process.stderr[-3000:]}"
            )
        cases = list(ElementTree.parse(results).iter("testcase"))
    failed = dict.fromkeys(short(case.get("name", "")) for case in cases if case.find("failure") is not None)
    return Verdict(mutation, tuple(failed), len(cases), time.monotonic() - began)


def short(name: str) -> str:
    """`row 12`, or what a test of the store promises."""
    row = re.match(r"test_row_(\d+)", name)
    return f"row {int(row[1])}" if row else name.partition("[")[0].removeprefix("test_").replace("_", " ")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.mutate", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MUTATIONS)}; all unless told")
    parser.add_argument("--report", type=Path, metavar="PATH", help="write the table there, as JSON")
    options = parser.parse_args()
    if unknown := set(options.names) - MUTATIONS.keys():
        parser.error(f"{', '.join(sorted(unknown))} is no mutation; known are {', '.join(MUTATIONS)}")
    verdicts = []
    for name in options.names or MUTATIONS:
        verdicts.append(judge(name))
        print(verdicts[-1].line, flush=True)
    if options.report:
        report.write(
            options.report, {"mutations": [as_json(verdict) for verdict in verdicts]}, beside=("celery", "sqlalchemy")
        )
    missed = [verdict.mutation for verdict in verdicts if not verdict.as_promised]
    if missed:
        print(f"not as promised: {', '.join(missed)}", file=sys.stderr)
    return bool(missed)


def as_json(verdict: Verdict) -> dict[str, object]:
    """What is published of it."""
    return {
        "mutation": verdict.mutation,
        "what": (MUTATIONS[verdict.mutation].__doc__ or "").strip(),
        "caught_by": list(verdict.caught),
        "tests_run": verdict.runs,
        "as_promised": verdict.as_promised,
        "seconds": round(verdict.seconds, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
