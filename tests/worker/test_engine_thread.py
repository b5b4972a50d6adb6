"""The engine thread: commands in, futures out, and nothing that happens to one job reaches another."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from uuid import uuid4

import numpy as np
import pytest
from numpy.typing import NDArray

from sd_engine import InvalidRequest, Request
from sd_engine.errors import DeviceLost
from tests.fakes import FakeEngine, fake_image, fake_workshop
from tests.worker.helpers import PATIENCE_S, Clock, Gate, once
from worker.engine_thread import EngineThread, Workshop
from worker.exit_codes import BROKEN
from worker.reasons import CancelAsked, Draining, StepBroke
from worker.saved_group import SavedGroup, seal_group, unseal_group


@contextmanager
def running(workshop: Workshop, **options: object) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: workshop, **options)  # type: ignore[arg-type]
    thread.start()
    thread.ready.result(PATIENCE_S)
    try:
        yield thread
    finally:
        thread.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def request(prompt: str = "a red star", **fields: object) -> Request:
    return Request(prompt, **({"steps": 3} | fields))  # type: ignore[arg-type]


def test_images_come_back_in_the_order_of_their_requests() -> None:
    requests = [request(seed=seed, steps=steps) for seed, steps in ((1, 5), (2, 1), (3, 3))]
    with running(fake_workshop()) as engine:
        images = engine.render(uuid4(), requests).result(PATIENCE_S)
    for image, asked in zip(images, requests, strict=True):
        np.testing.assert_array_equal(image, fake_image(asked))


def test_jobs_that_arrive_while_others_are_drawn_share_their_steps() -> None:
    gate = Gate()
    engines: list[FakeEngine] = []

    def before_step(engine: FakeEngine) -> None:
        engines.append(engine)
        gate(engine)

    with running(fake_workshop(before_step=before_step)) as engine:
        first = engine.render(uuid4(), [request(steps=4)])
        assert gate.reached.wait(PATIENCE_S)
        second = engine.render(uuid4(), [request(steps=3)])
        gate.opened.set()
        first.result(PATIENCE_S)
        second.result(PATIENCE_S)
    assert engines[0].steps == 4  # alone they would have taken seven


def test_an_idle_thread_steps_nothing() -> None:
    steps: list[FakeEngine] = []
    with running(fake_workshop(before_step=steps.append)) as engine:
        engine.render(uuid4(), [request(steps=2)]).result(PATIENCE_S)
        engine.interrupt(uuid4(), CancelAsked())  # wakes it for nothing
        engine.render(uuid4(), [request(steps=1)]).result(PATIENCE_S)
    assert len(steps) == 3


def test_an_interrupted_job_raises_the_reason_and_its_neighbour_finishes() -> None:
    gate, key = Gate(), uuid4()
    with running(fake_workshop(before_step=gate)) as engine:
        stopped = engine.render(key, [request(steps=500), request(steps=500)])
        neighbour = engine.render(uuid4(), [request(steps=4)])
        assert gate.reached.wait(PATIENCE_S)
        engine.interrupt(key, CancelAsked("by request"))
        gate.opened.set()
        with pytest.raises(CancelAsked, match="by request"):
            stopped.result(PATIENCE_S)
        assert len(neighbour.result(PATIENCE_S)) == 1


def test_a_row_that_fails_takes_its_job_and_no_other() -> None:
    with running(fake_workshop()) as engine:
        bad = engine.render(uuid4(), [request(), request("a broken row")])
        good = engine.render(uuid4(), [request(steps=6)])
        with pytest.raises(ArithmeticError, match="not finite"):
            bad.result(PATIENCE_S)
        assert len(good.result(PATIENCE_S)) == 1


def test_a_request_that_the_engine_refuses_fails_its_job_only() -> None:
    with running(fake_workshop()) as engine:
        bad = engine.render(uuid4(), [request(), request(model="unheard-of")])
        good = engine.render(uuid4(), [request()])
        with pytest.raises(InvalidRequest, match="unheard-of"):
            bad.result(PATIENCE_S)
        assert len(good.result(PATIENCE_S)) == 1


def test_a_step_that_raises_fails_the_jobs_in_flight_and_not_the_thread() -> None:
    def burst() -> None:
        raise RuntimeError("out of paint")

    with running(fake_workshop(before_step=once(burst))) as engine:
        with pytest.raises(RuntimeError, match="out of paint"):
            engine.render(uuid4(), [request()]).result(PATIENCE_S)
        assert len(engine.render(uuid4(), [request()]).result(PATIENCE_S)) == 1


def test_draining_drops_at_once_what_cannot_be_done_in_time_and_finishes_the_rest() -> None:
    clock, gate = Clock(), Gate()

    def before_step(engine: FakeEngine) -> None:
        clock.now += 1.0  # every step takes a second
        if engine.steps == 2:
            gate(engine)

    with running(fake_workshop(before_step=before_step), clock=clock) as engine:
        long, short = engine.render(uuid4(), [request(steps=900)]), engine.render(uuid4(), [request(steps=6)])
        assert gate.reached.wait(PATIENCE_S)
        engine.drain(clock.now + 20.0)
        late = engine.render(uuid4(), [request()])
        gate.opened.set()
        for dropped in (long, late):
            with pytest.raises(Draining):
                dropped.result(PATIENCE_S)
        assert len(short.result(PATIENCE_S)) == 1


def test_close_hands_back_what_is_in_flight() -> None:
    gate = Gate()
    with running(fake_workshop(before_step=gate)) as engine:
        future = engine.render(uuid4(), [request(steps=1000)])
        assert gate.reached.wait(PATIENCE_S)
        engine.close()
        gate.opened.set()
        with pytest.raises(Draining):
            future.result(PATIENCE_S)


def test_a_workshop_that_does_not_open_is_reported_to_the_process() -> None:
    def broken() -> Workshop:
        raise RuntimeError("no such device")

    thread = EngineThread(broken)
    thread.start()
    with pytest.raises(RuntimeError, match="no such device"):
        thread.ready.result(PATIENCE_S)
    thread.join(PATIENCE_S)


def test_a_thread_that_cannot_go_on_ends_the_process() -> None:
    died, codes = threading.Event(), []

    def step_and_die(engine: FakeEngine) -> None:
        raise SystemExit

    def note(code: int) -> None:
        codes.append(code)
        died.set()

    thread = EngineThread(lambda: fake_workshop(before_step=step_and_die), exit=note)
    thread.start()
    thread.render(uuid4(), [request()])
    assert died.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    assert codes == [BROKEN]


def dropped(future: Future[list[NDArray[np.uint8]]]) -> bytes | None:
    with pytest.raises(Draining) as caught:
        future.result(PATIENCE_S)
    return caught.value.saved


def close_at(steps: int, requests: list[Request], saved: bytes | None = None) -> tuple[bytes | None, int]:
    """What a thread hands back that is closed while its engine makes step number ``steps``; and all steps made."""
    gate, engines = Gate(), []

    def before_step(engine: FakeEngine) -> None:
        engines.append(engine)
        if engine.steps + 1 == steps:
            gate(engine)

    with running(fake_workshop(before_step=before_step)) as engine:
        future = engine.render(uuid4(), requests, saved)
        assert gate.reached.wait(PATIENCE_S)
        engine.close()
        gate.opened.set()
        return dropped(future), engines[-1].steps


def test_a_job_that_is_handed_back_goes_on_with_all_of_its_images() -> None:
    """One image is drawn already, one is half-way: together two workers make no step more than one would have."""
    requests = [request(seed=1, steps=2), request(seed=2, steps=9)]
    saved, steps = close_at(4, requests)
    engines: list[FakeEngine] = []
    with running(fake_workshop(before_step=engines.append)) as engine:
        images = engine.render(uuid4(), requests, saved).result(PATIENCE_S)
    for image, asked in zip(images, requests, strict=True):
        np.testing.assert_array_equal(image, fake_image(asked))
    assert (steps, engines[-1].steps) == (4, 5)


def test_a_job_may_be_handed_back_again_and_again() -> None:
    requests, saved, made = [request(seed=1, steps=9), request(seed=2, steps=12)], None, 0
    for _ in range(5):
        saved, steps = close_at(2, requests, saved)
        made += steps
    engines: list[FakeEngine] = []
    with running(fake_workshop(before_step=engines.append)) as engine:
        assert len(engine.render(uuid4(), requests, saved).result(PATIENCE_S)) == 2
    assert made + engines[-1].steps == 12


def test_a_job_that_was_not_begun_is_handed_back_with_nothing_or_with_what_it_came_with() -> None:
    requests = [request(steps=5)]
    saved, _ = close_at(2, requests)
    assert saved is not None
    gate = Gate()
    with running(fake_workshop(before_step=gate)) as engine:
        engine.render(uuid4(), [request(steps=1)])
        assert gate.reached.wait(PATIENCE_S)
        begun_elsewhere, new = engine.render(uuid4(), requests, saved), engine.render(uuid4(), requests)
        engine.drain(-1e9)
        late = engine.render(uuid4(), requests, saved)
        gate.opened.set()
        assert dropped(new) is None
        for came_with in (begun_elsewhere, late):
            assert unseal_group(requests, dropped(came_with) or b"") == unseal_group(requests, saved)


def test_all_images_may_be_drawn_already() -> None:
    requests = [request(seed=1)]
    saved = seal_group(requests, SavedGroup({0: fake_image(requests[0])}))
    steps: list[FakeEngine] = []
    with running(fake_workshop(before_step=steps.append)) as engine:
        (image,) = engine.render(uuid4(), requests, saved).result(PATIENCE_S)
    np.testing.assert_array_equal(image, fake_image(requests[0]))
    assert not steps


@pytest.mark.parametrize(
    "saved",
    [
        b"",
        b"rubbish",
        seal_group([request(seed=7)], SavedGroup({0: fake_image(request(seed=7))})),
        seal_group([request()], SavedGroup(rows={0: b"of another engine"})),
        seal_group([request()] * 2, SavedGroup(rows={1: b"1 a red star 0"})),
        seal_group([request()], SavedGroup({0: np.zeros((4, 4), np.uint8)})),
        seal_group([request()], SavedGroup({0: np.zeros((4, 4, 3), np.float32)})),
    ],
)
def test_what_cannot_be_used_of_a_saved_job_is_drawn_from_the_start(
    saved: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    engines: list[FakeEngine] = []
    with running(fake_workshop(before_step=engines.append)) as engine:
        (image,) = engine.render(uuid4(), [request()], saved).result(PATIENCE_S)
    np.testing.assert_array_equal(image, fake_image(request()))
    assert engines[-1].steps == 3
    assert "drawn from the start: the saved row cannot be used" in caplog.text


def test_rows_that_cannot_be_had_from_the_device_are_handed_back_without(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(FakeEngine):
        def save(self, id: int) -> bytes:
            raise RuntimeError("the device does not answer")

    gate = Gate()
    engine_ = Mute(before_step=lambda engine: gate(engine) if engine.steps else None)
    with running(Workshop(lambda: engine_, "fake", ())) as engine:
        future = engine.render(uuid4(), [request(steps=9)])
        assert gate.reached.wait(PATIENCE_S)
        engine.close()
        gate.opened.set()
        assert dropped(future) is None
    assert "draws it from the start" in caplog.text


def test_the_pace_of_a_job_that_came_half_drawn_is_that_of_its_steps_here() -> None:
    """It came with 90 of 100 steps, and a step takes a second: the grace is enough for what is left, or not."""
    clock, gate, engines = Clock(), Gate(), []

    def before_step(engine: FakeEngine) -> None:
        engines.append(engine)
        clock.now += 1.0
        if engine.steps == 2:
            gate(engine)

    requests = [request(steps=100)]
    saved = seal_group(requests, SavedGroup(rows={0: b"90 a red star 0"}))
    for grace_s, enough in ((9.0, True), (5.0, False)):
        gate.reached.clear()
        gate.opened.clear()
        with running(fake_workshop(before_step=before_step), clock=clock) as engine:
            future = engine.render(uuid4(), requests, saved)
            assert gate.reached.wait(PATIENCE_S)
            engine.drain(clock.now + grace_s)
            gate.opened.set()
            if enough:
                assert len(future.result(PATIENCE_S)) == 1
            else:
                assert dropped(future) is not None
                assert engines[-1].steps <= 4, "it went on though there was no hope"  # it leaves with the next step


def test_a_step_that_breaks_for_several_jobs_is_held_against_none() -> None:
    gate = Gate()

    def burst(engine: FakeEngine) -> None:
        gate(engine)
        if engine.steps == 1:
            raise ValueError("out of paint")

    with running(fake_workshop(before_step=burst)) as engine:
        first = engine.render(uuid4(), [request()])
        assert gate.reached.wait(PATIENCE_S)
        others = [engine.render(uuid4(), [request(seed=seed), request()]) for seed in (1, 2)]
        gate.opened.set()
        reasons = [future.exception(PATIENCE_S) for future in (first, *others)]
    assert len({id(reason) for reason in reasons}) == 3
    for reason in reasons:
        assert isinstance(reason, StepBroke) and isinstance(reason.__cause__, ValueError)


def test_how_long_a_step_has_lasted_is_told_while_it_runs_and_only_then() -> None:
    clock, gate = Clock(), Gate()
    with running(fake_workshop(before_step=gate), clock=clock) as engine:
        assert engine.stuck_s() == 0.0
        future = engine.render(uuid4(), [request(steps=1)])
        assert gate.reached.wait(PATIENCE_S)
        clock.now += 42.0
        assert engine.stuck_s() == 42.0
        gate.opened.set()
        future.result(PATIENCE_S)
        assert engine.stuck_s() == 0.0


def test_the_time_that_models_take_to_load_is_no_step() -> None:
    clock, gate = Clock(), Gate()

    def slow() -> Workshop:
        gate(FakeEngine())
        return fake_workshop()

    thread = EngineThread(slow, clock=clock)
    thread.start()
    assert gate.reached.wait(PATIENCE_S)
    clock.now += 300.0
    assert thread.stuck_s() == 0.0
    gate.opened.set()
    thread.ready.result(PATIENCE_S)
    thread.close()
    thread.join(PATIENCE_S)


def test_a_lost_device_ends_the_process_and_fails_no_job() -> None:
    died, codes = threading.Event(), []

    def lose(engine: FakeEngine) -> None:
        raise DeviceLost("an illegal memory access was encountered")

    def note(code: int) -> None:
        codes.append(code)
        died.set()

    thread = EngineThread(lambda: fake_workshop(before_step=lose), exit=note)
    thread.start()
    future = thread.render(uuid4(), [request()])
    assert died.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    assert codes == [BROKEN] and not future.done()
