"""The engine thread: commands in, futures out, and nothing that happens to one job reaches another."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import numpy as np
import pytest

from sd_engine import InvalidRequest, Request
from tests.fakes import FakeEngine, fake_image, fake_workshop
from tests.worker.helpers import PATIENCE_S, Clock, Gate, once
from worker.engine_thread import EngineThread, Workshop
from worker.exit_codes import BROKEN
from worker.reasons import CancelAsked, Draining


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
