"""A process without files or threads to be had leaves, and hands its jobs back."""

import os
import resource
from collections.abc import Iterator

import pytest

from worker.exit_codes import BROKEN
from worker.means import LOOKS, SPARE_FILES, Means, what_lacks


@pytest.fixture
def no_files() -> Iterator[None]:
    """No file may be opened while it lasts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class World:
    def __init__(self) -> None:
        self.codes: list[int] = []
        self.given_back = 0
        self.means = Means(self.give_back, exit=self.codes.append)

    def give_back(self) -> None:
        self.given_back += 1
        raise ConnectionError("needs a file, too")


def test_a_process_that_can_open_no_file_leaves_after_some_looks(no_files: None) -> None:
    world = World()
    for _ in range(LOOKS - 1):
        world.means.tick()
    assert (world.codes, world.given_back) == ([], 0)
    world.means.tick()
    assert (world.codes, world.given_back) == ([BROKEN], 1)


def test_a_process_that_can_start_no_thread_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refused)
    world = World()
    for _ in range(LOOKS):
        world.means.tick()
    assert world.codes == [BROKEN]


def test_a_peak_is_no_reason_and_a_look_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    lacks = iter([*["Too many open files"] * (LOOKS - 1), "", "Too many open files"])
    with monkeypatch.context() as patched:
        patched.setattr("worker.means.what_lacks", lambda: next(lacks))
        for _ in range(LOOKS + 1):
            world.means.tick()
    assert world.codes == []
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    assert what_lacks() == "" and SPARE_FILES > 1
    assert (os.listdir("/proc/self/fd") if before else []) == before
