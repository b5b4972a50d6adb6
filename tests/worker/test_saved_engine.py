"""Real models: a job that a leaving worker handed back has the pixels of one that nobody disturbed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.spec import JobSpec
from sd_engine import Engine, Model, Request, load_model, shipped_model
from tests.worker.helpers import PATIENCE_S
from worker.encode import encode
from worker.engine_thread import EngineThread, Pixels, Workshop
from worker.reasons import Draining


@dataclass
class Counted:
    """A model's U-Net that counts its calls, and holds the one numbered ``hold`` until it is let go."""

    model: Model
    hold: int = 0
    calls: int = 0
    held: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._forward = self.model.unet.forward

    def __call__(self, x: Tensor, t: Tensor, context: object) -> Tensor:
        self.calls += 1
        if self.calls == self.hold:
            self.held.set()
            assert self.let_go.wait(PATIENCE_S)
        return self._forward(x, t, context)  # type: ignore[arg-type]


@contextmanager
def working(model: Model) -> Iterator[EngineThread]:
    thread = EngineThread(lambda: Workshop(lambda: Engine(model), "cpu", (model.name,), guard=torch.inference_mode))
    thread.start()
    thread.ready.result(PATIENCE_S)
    yield thread
    thread.close()
    thread.join(PATIENCE_S)


def handed_back(model: Model, unet: Counted, requests: Sequence[Request], saved: bytes | None = None) -> bytes | None:
    """What a worker hands back that is told to leave in the midst of the step that ``unet`` holds."""
    with working(model) as worker:
        future = worker.render(uuid4(), requests, saved)
        assert unet.held.wait(PATIENCE_S)
        worker.drain(-1e9)
        unet.let_go.set()
        with pytest.raises(Draining) as caught:
            future.result(PATIENCE_S)
    return caught.value.saved


def drawn(model: Model, requests: Sequence[Request], saved: bytes | None = None) -> list[Pixels]:
    with working(model) as worker:
        return worker.render(uuid4(), requests, saved).result(PATIENCE_S)


@pytest.mark.parametrize("hold", [1, 4, 7])
def test_a_machine_that_leaves_loses_no_step(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, hold: int) -> None:
    model = load_model(tiny_folder)
    request = Request("red cat", seed=3, steps=8, sampler="dpmpp_2m_sde", width=64, height=64)
    (alone,) = drawn(model, [request])
    unet = Counted(model, hold)
    monkeypatch.setattr(model.unet, "forward", unet)
    saved = handed_back(model, unet, [request])
    assert unet.calls == hold
    np.testing.assert_array_equal(drawn(model, [request], saved)[0], alone)
    assert unet.calls == 8, "both workers together made as many steps as one would have"


def test_several_images_go_on_together_those_drawn_already_too(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_folder)
    asked = Request("red cat", steps=3, sampler="euler_a", guidance=None, width=64, height=64)
    requests = [asked, replace(asked, seed=1, steps=9), replace(asked, seed=2, steps=6, upscale=1.5)]
    alone = [drawn(model, [request])[0] for request in requests]
    unet = Counted(model, 5)
    monkeypatch.setattr(model.unet, "forward", unet)
    saved = handed_back(model, unet, requests)
    for image, wanted in zip(drawn(model, requests, saved), alone, strict=True):
        # One level: packs of other sizes add in another order (`tests/engine/test_packing.py`).
        assert np.abs(image.astype(int) - wanted.astype(int)).max() <= 1


def test_the_shipped_model_s_picture_is_the_same_file_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(shipped_model())
    spec = JobSpec(prompt="a red star on a blue background", seed=11, steps=8)
    request = Request(spec.prompt, seed=11, steps=8)
    (alone,) = drawn(model, [request])
    saved: bytes | None = None
    for step in (2, 3):  # handed back twice: after two steps, and after three more
        unet = Counted(model, step)
        with monkeypatch.context() as patch:
            patch.setattr(model.unet, "forward", unet)
            saved = handed_back(model, unet, [request], saved)
    again = drawn(model, [request], saved)[0]
    np.testing.assert_array_equal(again, alone)
    assert encode(again, spec, 11).data == encode(alone, spec, 11).data
