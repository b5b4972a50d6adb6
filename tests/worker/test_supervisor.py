"""The supervisor, with small real children instead of workers."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from tests.worker.helpers import PATIENCE_S
from worker.exit_codes import WRONG_SETTINGS
from worker.supervisor import BackOff, Supervisor

QUICK = BackOff(first_s=0.01, most_s=0.05, forgiven_s=60.0)

# Adds a line to the file named first, then ends with the code that stands at its own turn in the arguments.
FAIL_THEN_END = """
import pathlib, sys
lives = pathlib.Path(sys.argv[1])
with lives.open("a") as file: file.write("x")
sys.exit(int(sys.argv[1 + len(lives.read_text())]))
"""
# Says that it is ready by a FIFO, leaves politely on SIGTERM.
WAIT_FOR_SIGTERM = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
pathlib.Path(sys.argv[1]).write_text("ready")
while True: signal.pause()
"""
# The same, but deaf.
DEAF = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text("ready")
while True: signal.pause()
"""


def child(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def run_in_thread(supervisor: Supervisor) -> tuple[threading.Thread, list[int]]:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(supervisor.run()))
    thread.start()
    return thread, results


def make_fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_a_dead_child_is_started_again_until_it_is_done(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    assert Supervisor([child(FAIL_THEN_END, lives, 70, 69, 0)], grace_s=5, back_off=QUICK).run() == 0
    assert lives.read_text() == "xxx"


def test_wrong_settings_are_not_tried_again(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    assert Supervisor([child(FAIL_THEN_END, lives, 2)], grace_s=5, back_off=QUICK).run() == WRONG_SETTINGS
    assert lives.read_text() == "x"


def test_a_signal_reaches_every_child_and_ends_the_supervisor(tmp_path: Path) -> None:
    fifos = [make_fifo(tmp_path / name) for name in ("a", "b")]
    supervisor = Supervisor([child(WAIT_FOR_SIGTERM, fifo) for fifo in fifos], grace_s=PATIENCE_S, back_off=QUICK)
    thread, results = run_in_thread(supervisor)
    assert [fifo.read_text() for fifo in fifos] == ["ready", "ready"]
    supervisor.stop(signal.SIGTERM)
    supervisor.stop(signal.SIGTERM)  # a second signal changes nothing
    thread.join(PATIENCE_S)
    assert results == [0]
    assert supervisor.pids() == []


def test_a_child_that_does_not_leave_is_killed_after_the_grace_time(tmp_path: Path) -> None:
    fifo = make_fifo(tmp_path / "deaf")
    supervisor = Supervisor([child(DEAF, fifo)], grace_s=0.1, back_off=QUICK)
    thread, results = run_in_thread(supervisor)
    assert fifo.read_text() == "ready"
    supervisor.stop()
    thread.join(PATIENCE_S)
    assert results == [0]


@pytest.mark.parametrize(
    ("wait_s", "lived_s", "expected"), [(0, 1, 1), (1, 1, 2), (40, 1, 60), (60, 1, 60), (60, 61, 1)]
)
def test_the_wait_doubles_up_to_its_limit_and_is_forgiven_after_a_long_life(
    wait_s: float, lived_s: float, expected: float
) -> None:
    assert BackOff().after(wait_s, lived_s) == expected
