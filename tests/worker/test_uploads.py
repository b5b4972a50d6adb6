"""Deliveries beside the engine: bounded, and never in its way."""

import threading

import pytest

from tests.worker.helpers import wait
from worker.reasons import Draining
from worker.uploads import Uploads


def no_check() -> None:
    """Nothing happened meanwhile."""


def test_what_is_put_is_delivered_by_another_thread() -> None:
    uploads, seen = Uploads(4, threads=2), list[str]()
    uploads.put(lambda: seen.append(threading.current_thread().name), check=no_check)
    uploads.join()
    assert len(seen) == 1 and seen[0].startswith("upload-")


def test_a_full_house_makes_the_caller_wait_until_one_has_left() -> None:
    uploads, may_end, third = Uploads(2, threads=2), threading.Event(), threading.Event()
    for _ in range(2):
        uploads.put(lambda: wait(may_end), check=no_check)
    assert uploads.inside() == 2
    caller = threading.Thread(target=lambda: uploads.put(third.set, check=no_check), daemon=True)
    caller.start()
    assert not third.wait(0.1)
    assert uploads.inside() == 2, "who waits at the door is not inside"
    may_end.set()
    wait(third)
    uploads.join()
    assert uploads.inside() == 0


def test_who_waits_at_the_door_can_be_called_away() -> None:
    uploads, may_end = Uploads(1, threads=1), threading.Event()
    uploads.put(lambda: wait(may_end), check=no_check)

    def leave() -> None:
        raise Draining("the worker ends")

    with pytest.raises(Draining):
        uploads.put(no_check, check=leave)
    may_end.set()
    uploads.join()


def test_a_delivery_that_raises_gives_its_place_back(caplog: pytest.LogCaptureFixture) -> None:
    uploads = Uploads(1, threads=1)

    def broken() -> None:
        raise SystemExit

    for _ in range(3):
        uploads.put(broken, check=no_check)
    uploads.join()
    assert caplog.text.count("a delivery raised") == 3
