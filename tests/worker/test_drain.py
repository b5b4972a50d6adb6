"""Leaving: the order of the steps, one drain for many signals, and the watchdog."""

import threading
from dataclasses import replace

from tests.worker.helpers import PATIENCE_S, wait
from worker.drain import Drain, DrainSteps


class Steps:
    """Notes what the drain did."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.stopped, self.exited = threading.Event(), threading.Event()

    def as_steps(self) -> DrainSteps:
        return DrainSteps(
            admit_nothing=lambda: self.done.append("admit nothing"),
            finish_until=lambda deadline: self.done.append("finish"),
            stop_consuming=self._stop,
            release_all=lambda: self.done.append("release"),
            exit=self._exit,
        )

    def _stop(self) -> None:
        self.done.append("stop")
        self.stopped.set()

    def _exit(self, code: int) -> None:
        self.done.append(f"exit {code}")
        self.exited.set()


def test_many_requests_make_one_drain_in_the_right_order() -> None:
    steps = Steps()
    drain = Drain(steps.as_steps(), grace_s=60)
    drain.start()
    for _ in range(5):
        drain.request("SIGTERM")
    wait(steps.stopped)
    drain.left()
    drain.join(PATIENCE_S)
    assert steps.done == ["admit nothing", "finish", "stop"]


def test_a_process_that_hangs_is_ended_with_its_jobs_released() -> None:
    steps = Steps()
    drain = Drain(steps.as_steps(), grace_s=0.2)
    drain.start()
    drain.request("SIGTERM")
    wait(steps.exited)
    assert steps.done == ["admit nothing", "finish", "stop", "release", "exit 0"]


def test_a_database_that_hangs_does_not_hold_the_process() -> None:
    steps, never = Steps(), threading.Event()
    drain = Drain(replace(steps.as_steps(), release_all=lambda: wait(never)), grace_s=0.2)
    drain.start()
    drain.request("SIGTERM")
    wait(steps.exited)
    never.set()


def test_a_step_that_raises_stops_no_other() -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    steps = Steps()
    broken = replace(steps.as_steps(), admit_nothing=breaks, finish_until=breaks, release_all=breaks)
    drain = Drain(broken, grace_s=0.2)
    drain.start()
    drain.request("SIGTERM")
    wait(steps.exited)
    assert steps.done == ["stop", "exit 0"]
