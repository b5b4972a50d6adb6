"""The tie between supervisor and worker, with real processes at its ends."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.helpers import PATIENCE_S, wait
from worker.exit_codes import HUNG, UNAVAILABLE
from worker.lifeline import ALIVE, READY, VARIABLE, Lifeline, Listening
from worker.supervisor import BackOff, Supervisor

QUICK = BackOff(first_s=0.01, most_s=0.05, forgiven_s=60.0)
ROOT = Path(__file__).parents[2]

# A worker in small: tied, ready, then what its own code does. `life` counts from 1 in the file named first.
WORKER = """
import pathlib, re, sys, time
from worker.lifeline import Lifeline
lives = pathlib.Path(sys.argv[1])
with lives.open("a") as file: file.write("x")
life = len(lives.read_text())
line = Lifeline.from_environment()
line.start()
"""
HANGS_ONCE = WORKER + "line.ready()\nif life == 1: re.match(r'(a+)+$', 'a' * 60 + 'b')"  # holds the interpreter's lock
STOPS_ONCE = WORKER + "import os, signal\nline.ready()\nif life == 1: os.kill(os.getpid(), signal.SIGSTOP)"
# Ready in its first life, then a service is away for a life.
AWAY_LATER = WORKER + "if life == 1: line.ready()\nsys.exit({1: 70, 2: 69, 3: 0}[life])"
NEVER_READY = WORKER + "sys.exit(69)"
DIES_THEN_AWAY = WORKER + "import os\nif life == 1: os.kill(os.getpid(), 9)\nsys.exit(69)"
# Tells by a FIFO who its child is; the child tells by another that it was orphaned.
SUPERVISOR = """
import sys
from worker.supervisor import Supervisor
Supervisor([[sys.executable, "-c", sys.argv[1], *sys.argv[2:]]], grace_s=9, hang_limit_s=60).run()
"""
ORPHAN = """
import pathlib, signal, sys
from worker.lifeline import Lifeline
line = Lifeline.from_environment()
line.tell(lambda: pathlib.Path(sys.argv[1]).write_text("orphaned"))
line.start()
line.ready()
pathlib.Path(sys.argv[2]).write_text("ready")
line.join()
"""


BEGINS_LATE = """
import sys, time
open(sys.argv[1], "a").write(".")
time.sleep(2.0)  # ten times what it may be silent later
"""


def supervised(tmp_path: Path, code: str, hang_limit_s: float = PATIENCE_S) -> tuple[int, int]:
    """The supervisor's result and how often its child lived."""
    lives = tmp_path / "lives"
    command = [sys.executable, "-c", code, str(lives)]
    supervisor = Supervisor([command], grace_s=PATIENCE_S, hang_limit_s=hang_limit_s, back_off=QUICK)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(supervisor.run()))
    thread.start()
    thread.join(2 * PATIENCE_S)
    supervisor.stop()
    assert results, f"no end after {len(lives.read_text())} lives"
    return results[0], len(lives.read_text())


@pytest.mark.parametrize("code", [HANGS_ONCE, STOPS_ONCE])
def test_a_process_without_a_sign_of_life_is_killed_and_started_again(
    tmp_path: Path, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert supervised(tmp_path, code, hang_limit_s=2.0) == (0, 2)
    assert f"ended with {HUNG}" in caplog.text


def test_a_process_that_takes_long_to_begin_is_not_killed_for_it(tmp_path: Path) -> None:
    assert supervised(tmp_path, BEGINS_LATE, hang_limit_s=0.2) == (0, 1)


def test_a_service_that_is_away_at_the_start_is_told_once_and_later_tried_again(tmp_path: Path) -> None:
    assert supervised(tmp_path, NEVER_READY) == (UNAVAILABLE, 1)
    (tmp_path / "lives").unlink()
    assert supervised(tmp_path, AWAY_LATER) == (0, 3)


def test_a_child_that_a_signal_ended_at_its_start_is_tried_again(tmp_path: Path) -> None:
    assert supervised(tmp_path, DIES_THEN_AWAY) == (UNAVAILABLE, 2)


def test_a_worker_notices_that_its_supervisor_was_killed(tmp_path: Path) -> None:
    orphaned, ready = tmp_path / "orphaned", tmp_path / "ready"
    for fifo in (orphaned, ready):
        os.mkfifo(fifo)
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, ORPHAN, orphaned, ready], cwd=ROOT)
    assert ready.read_text() == "ready"
    supervisor.kill()
    supervisor.wait()
    assert orphaned.read_text() == "orphaned"


def test_a_program_that_cannot_be_started_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    program = tmp_path / "program"
    supervisor = Supervisor([[str(program)]], grace_s=5, hang_limit_s=PATIENCE_S, back_off=QUICK)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(supervisor.run()))
    thread.start()
    program.with_suffix(".new").write_text(f"#!{sys.executable}\n")
    program.with_suffix(".new").chmod(0o700)
    while "not started" not in caplog.text:
        threading.Event().wait(0.01)
    program.with_suffix(".new").rename(program)
    thread.join(PATIENCE_S)
    assert results == [0]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Listening, Lifeline]]:
    """Both ends in this process."""
    listening = Listening()
    monkeypatch.setenv(VARIABLE, str(os.dup(listening.pass_fds[0])))
    lifeline = Lifeline.from_environment()
    listening.started()
    assert lifeline is not None and VARIABLE not in os.environ
    yield listening, lifeline
    listening.close()


def test_signs_of_life_arrive_and_a_silent_supervisor_blocks_nothing(ends: tuple[Listening, Lifeline]) -> None:
    listening, lifeline = ends
    gone = threading.Event()
    lifeline.tell(gone.set)
    for _ in range(10_000):  # far more than fits while nobody reads
        lifeline.ready()
    lifeline.start()
    assert READY in listening.hear()
    while ALIVE not in listening.hear():
        threading.Event().wait(0.05)
    listening.close()
    wait(gone)
    lifeline.join(PATIENCE_S)


@pytest.mark.parametrize("value", ["", "none", "9999"])
def test_without_a_supervisor_there_is_no_lifeline(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    assert Lifeline.from_environment() is None
