"""``nightshift worker`` as it is started by people: the supervisor and a real worker under it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs import Settings
from tests.integration.processes import PATIENCE_S, process, tail, wait_until
from tests.worker.test_memory import arenas_of_threads, glibc_only

ROOT = Path(__file__).parents[2]
# A demo that is killed, and its worker: tells by a FIFO that it was left alone.
DEMO = """
import sys
from jobs import Settings
from worker.demo import running_worker
settings = Settings()
settings.home.mkdir()
with running_worker(settings, [sys.executable, "-c", sys.argv[1], *sys.argv[2:]]) as worker: worker.wait()
"""
LEFT_ALONE = """
import pathlib, sys
from worker.lifeline import Lifeline
line = Lifeline.from_environment()
line.tell(lambda: pathlib.Path(sys.argv[1]).write_text("left alone"))
line.start()
pathlib.Path(sys.argv[2]).write_text("ready")
line.join()
"""


@pytest.fixture
def with_tiny(settings: Settings, tiny_folder: Path) -> Settings:
    settings.make_home()
    return settings.model_copy(update={"models": {"nightshift-mini": str(tiny_folder)}})


@contextmanager
def worker_command(settings: Settings, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = ["-m", "worker", "--device", "cpu", "--threads", "1", *options]
    with process(command, settings, log) as supervisor:
        yield supervisor


def ready_pids(log: Path) -> list[int]:
    text = log.read_text(errors="replace") if log.exists() else ""
    return [int(pid) for pid in re.findall(r"worker [^ :]+:(\d+):\S+ ready:", text)]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@glibc_only
def test_all_threads_of_a_worker_take_their_memory_where_the_engine_does(with_tiny: Settings, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with worker_command(with_tiny, log):
        wait_until(lambda: len(ready_pids(log)) == 1, "a worker", log)
        assert arenas_of_threads(ready_pids(log)[0]) == 0


def test_a_killed_worker_is_started_again_and_many_signals_make_one_orderly_end(
    with_tiny: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with worker_command(with_tiny, log) as supervisor:
        wait_until(lambda: len(ready_pids(log)) == 1, "a worker", log)
        os.kill(ready_pids(log)[0], signal.SIGKILL)
        wait_until(lambda: len(ready_pids(log)) == 2, "the next worker", log)
        for number in [*[signal.SIGTERM] * 5, signal.SIGINT]:
            supervisor.send_signal(number)
        assert supervisor.wait(PATIENCE_S) == 0, tail(log)
        assert "ended with -9; starting it again" in log.read_text()
        assert "Traceback" not in log.read_text()
        assert all(is_gone(pid) for pid in ready_pids(log))


def test_a_worker_whose_supervisor_was_killed_leaves_by_itself(with_tiny: Settings, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with worker_command(with_tiny, log) as supervisor:
        wait_until(lambda: len(ready_pids(log)) == 1, "a worker", log)
        supervisor.kill()
        supervisor.wait()
        wait_until(lambda: "the supervisor is gone: leaving" in log.read_text(), "the drain", log)
        wait_until(lambda: " left\n" in log.read_text(), "an orderly end", log)


def test_a_worker_of_a_killed_demo_notices_it(settings: Settings, tmp_path: Path) -> None:
    left_alone, ready = tmp_path / "left alone", tmp_path / "ready"
    for fifo in (left_alone, ready):
        os.mkfifo(fifo)
    environment = os.environ | {"NIGHTSHIFT_HOME": str(settings.home)}
    demo = subprocess.Popen([sys.executable, "-c", DEMO, LEFT_ALONE, left_alone, ready], cwd=ROOT, env=environment)
    assert ready.read_text() == "ready"
    demo.kill()
    demo.wait()
    assert left_alone.read_text() == "left alone"
