"""Worker and producer processes for end-to-end tests, and how to wait for what they do."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from jobs import Settings

PATIENCE_S = 120.0
"""Longest wait for an event that must come; far above what it takes on a loaded machine."""
ROOT = Path(__file__).parents[2]


def environment(settings: Settings) -> Mapping[str, str]:
    """The variables that make another process use these settings."""
    return os.environ | {
        "NIGHTSHIFT_HOME": str(settings.home),
        "NIGHTSHIFT_DATABASE_URL": settings.database_url,
        "NIGHTSHIFT_BROKER_URL": settings.broker_url,
        "NIGHTSHIFT_STORAGE_URL": settings.storage_url,
        "NIGHTSHIFT_MODELS": ",".join(f"{name}={path}" for name, path in settings.models.items()),
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def process(command: list[str], settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with these settings; killed at the end if it still runs. Its output goes to ``log``."""
    with log.open("ab") as output:
        started = subprocess.Popen(
            [sys.executable, *command],
            env=environment(settings),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()


def fake_worker(
    settings: Settings, log: Path, *, step_s: float, **options: object
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """A worker process with the fake engine."""
    return process(["-m", "tests.integration.fake_worker", json.dumps(options), str(step_s)], settings, log)


def real_worker(settings: Settings, log: Path, *options: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """``nightshift worker`` itself, on the CPU with one thread, without a supervisor that would start it again."""
    command = ["-m", "worker", "--no-supervisor", "--device", "cpu", "--threads", "1", *options]
    return process(command, settings, log)


def wait_until(happened: Callable[[], bool], what: str, log: Path) -> None:
    """Look again and again until ``happened``; on time-out the test fails with the end of ``log``."""
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen; the log ends:\n{tail(log)}")
        time.sleep(0.02)


def tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


def has_line(log: Path, text: str) -> Callable[[], bool]:
    return lambda: log.exists() and text in log.read_text(errors="replace")


def stop(worker: subprocess.Popen[bytes], log: Path) -> None:
    """SIGTERM, and the promise that goes with it: exit code 0."""
    worker.terminate()
    assert worker.wait(PATIENCE_S) == 0, tail(log)
