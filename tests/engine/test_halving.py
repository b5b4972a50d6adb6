"""A pack that does not fit is halved and its lane remembers, no picture knows; a row that fits nowhere fails alone."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from sd_engine import Engine, Finished, Model, Request, load_model, runner
from sd_engine.errors import DeviceLost, OutOfMemory
from sd_engine.halving import halving, is_out_of_memory
from sd_engine.row import Lane, Row
from sd_engine.unet import UNet

REQUESTS = tuple(
    Request("red cat", seed=seed, steps=4, sampler=sampler, guidance=5.0, width=64, height=64)
    for seed, sampler in enumerate(("euler_a", "ddpm", "dpmpp_2m", "ddim"))
)
LANE = Lane("tiny", 64, 64)


class SmallDevice:
    """A U-Net on a device whose memory holds `fits` U-Net rows and no more; it fails as PyTorch does."""

    def __init__(self, unet: UNet, fits: int) -> None:
        self._forward = unet.forward
        self.fits = fits
        self.refused: list[int] = []
        self.stepped: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, context: object) -> Tensor:
        if len(x) > self.fits:
            self.refused.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        self.stepped.append(len(x))
        return self._forward(x, t, context)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


def test_a_pack_out_of_memory_is_halved_and_every_picture_is_what_it_would_have_been(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Engine(model).render(REQUESTS)
    device = SmallDevice(model.unet, fits=4)
    monkeypatch.setattr(model.unet, "forward", device)
    pictures = Engine(model).render(REQUESTS)
    assert device.refused, "the device was never too small: nothing was tested"
    for picture, wanted in zip(pictures, undisturbed, strict=True):
        # One level of 256: another batch size is another order of addition (`test_packing.ONE_LEVEL`).
        assert np.abs(picture.astype(int) - wanted.astype(int)).max() <= 1


def test_the_lane_remembers_what_did_not_fit(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SmallDevice(model.unet, fits=4)
    monkeypatch.setattr(model.unet, "forward", device)
    engine = Engine(model)
    engine.render(REQUESTS)
    assert device.refused == [8], "only the first step tried what does not fit"
    engine.render(REQUESTS)
    assert device.refused == [8], "nor did a later job of the same lane"
    assert engine.packer.limit(LANE) == 4 * LANE.cells
    assert engine.packer.limit(Lane("tiny", 64, 128)) == engine.packer.max_units, "another lane has its own limit"


def test_a_row_that_does_not_fit_alone_fails_in_a_sentence_and_its_neighbours_do_not(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.unet, "forward", SmallDevice(model.unet, fits=1))
    engine = Engine(model)
    guided = engine.add(REQUESTS[0])
    unguided = engine.add(Request("cat", guidance=None, steps=2, width=64, height=64))
    endings: dict[int, Finished] = {}
    while not engine.idle:
        endings |= {finished.id: finished for finished in engine.step()}
    assert isinstance(endings[guided].error, OutOfMemory)
    assert "64 x 64" in str(endings[guided].error) and "offload" in str(endings[guided].error)
    assert endings[unguided].error is None


def test_a_step_that_fails_after_drawing_its_noise_does_not_draw_it_again(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row's noise does not fit on the device; the first row's was drawn already, and must not be lost."""
    request = Request("cat", seed=3, steps=3, sampler="euler_a", guidance=None, width=64, height=64)
    (alone,) = Engine(model).render([request])
    engine = Engine(model)
    first, second = engine.add(request), engine.add(request)
    engine.step()
    row = engine._rows[second]
    assert row.noise is not None
    draw, failures = row.noise.draw, iter([True])

    def fails_once(shape: tuple[int, ...]) -> Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("no room for the noise")
        return draw(shape)

    monkeypatch.setattr(row.noise, "draw", fails_once)
    endings: dict[int, npt.NDArray[np.uint8] | None] = {}
    while not engine.idle:
        endings |= {finished.id: finished.image for finished in engine.step()}
    for id in (first, second):
        image = endings[id]
        assert image is not None
        assert np.abs(image.astype(int) - alone.astype(int)).max() <= 1


def test_what_a_failed_call_held_is_free_before_its_halves_begin(model: Model) -> None:
    """On a full device the halves need the memory that the whole pack's tensors had."""
    engine = Engine(model)
    rows = [engine._rows[engine.add(request)] for request in REQUESTS[:2]]
    held: list[weakref.ref[Tensor]] = []

    def work(pack: Sequence[Row]) -> None:
        assert not [tensor for tensor in held if tensor() is not None]
        large = torch.zeros(len(pack))
        held.append(weakref.ref(large))
        if len(pack) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    halving(work, rows)
    assert len(held) == 3 and not any(row.error for row in rows)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("expected scalar type Half but found Float"), False),
    ],
)
def test_only_want_of_memory_is_taken_for_it(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_cpus_own_refusal_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_row_that_cannot_be_prepared_for_want_of_memory_fails_alone_in_a_sentence(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        engine = Engine(model)
        ids = [engine.add(request) for request in REQUESTS[:3]]
        rows = engine._rows
        contexts = engine.runner.prompts["tiny"].contexts  # type: ignore[attr-defined]

        def refuse(request: Request, *, of: Row = rows[ids[1]], error: Exception = error, ask: Any = contexts) -> Any:
            if request is of.request:
                raise error
            return ask(request)

        monkeypatch.setattr(engine.runner.prompts["tiny"], "contexts", refuse)  # type: ignore[attr-defined]
        endings: dict[int, Finished] = {}
        while not engine.idle:
            endings |= {finished.id: finished for finished in engine.step()}
        assert [endings[id].error is None for id in ids] == [True, False, True]
        assert isinstance(endings[ids[1]].error, OutOfMemory)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), ValueError("bad")])
@pytest.mark.parametrize("place", range(4))
def test_one_bad_row_of_a_pack_fails_alone_and_its_neighbours_pictures_are_theirs(
    model: Model, monkeypatch: pytest.MonkeyPatch, place: int, error: Exception
) -> None:
    """It fails wherever it is stepped; the others are stepped in the same step all the same."""
    alone = [Engine(model).render([request])[0] for request in REQUESTS]
    engine = Engine(model)
    ids = [engine.add(request) for request in REQUESTS]
    engine.step()
    noised = runner._noised

    def fails(row: Row, state: Tensor) -> Tensor:
        if row.id == ids[place]:
            raise error
        return noised(row, state)

    monkeypatch.setattr(runner, "_noised", fails)
    (bad,) = engine.step()
    assert bad.id == ids[place] and bad.error is not None
    if isinstance(error, ValueError):
        assert bad.error is error and bad.error.__traceback__ is not None, "where it happened is kept for the job"
    else:
        assert isinstance(bad.error, OutOfMemory) and bad.error.__cause__ is error
    assert all(engine.progress(id) == (2, 4) for id in ids if id != ids[place])
    while not engine.idle:
        for finished in engine.step():
            assert finished.image is not None, finished.error
            wanted = alone[ids.index(finished.id)]
            assert np.abs(finished.image.astype(int) - wanted.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ..."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("HIP error: unspecified launch failure"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA error: invalid configuration argument"), False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), False),
        (ValueError("a prompt that speaks of an illegal memory access"), False),
    ],
)
def test_a_lost_device_is_nobody_s_fault_and_no_row_is_failed_for_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: bool
) -> None:
    def broken(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(model.unet, "forward", broken)
    engine = Engine(model)
    ids = [engine.add(request) for request in REQUESTS[:2]]
    if expected:
        with pytest.raises(DeviceLost, match="lost to this process") as caught:
            engine.step()
        assert "\n" not in str(caught.value)
        assert all(engine._rows[id].error is None for id in ids)
    else:
        assert len(engine.step()) == 2, "each failed by itself"
