"""On a CUDA device: the dtypes, the modes of offload and what they leave there. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch

from sd_engine import Engine, Request, load_model, shipped_model
from sd_engine.devices import pick_device, pick_dtype
from sd_engine.offload import OFFLOADS, Offload

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
REQUESTS = [
    Request("a red star on a white background", seed=1, steps=20),
    Request("a blue circle on a yellow background", seed=2, steps=20, sampler="euler_a"),
]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Convolutions in TF32, PyTorch's default, keep 10 bits: that is not the fp32 that is compared here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _draw(device: str, dtype: str, offload: Offload = "resident") -> npt.NDArray[np.int_]:
    return np.stack(Engine(load_model(shipped_model(), device, dtype, offload=offload)).render(REQUESTS)).astype(int)


def test_auto_is_cuda_and_its_usual_dtype_is_fp16() -> None:
    device = pick_device("auto")
    assert (device.type, pick_dtype("auto", device)) == ("cuda", torch.float16)


# On the CPU, fp16 is 0.05 levels from fp32 on average, bf16 0.5 (`benchmarks.dtypes`); the noise is drawn on the CPU
# whatever the device, so that only rounding differs. Ten times that is still no other picture.
@pytest.mark.parametrize(("dtype", "levels"), [("fp32", 0.1), ("fp16", 0.5), ("bf16", 5.0)])
def test_the_pictures_are_those_of_the_cpu(dtype: str, levels: float) -> None:
    assert np.abs(_draw("cuda", dtype) - _draw("cpu", "fp32")).mean() < levels


@pytest.mark.parametrize("offload", ["idle", "sequential"])
def test_no_picture_depends_on_the_mode(offload: Offload) -> None:
    # The same kernels see the same numbers; only cuDNN may choose another algorithm, by the memory that is free, and
    # what that rounds otherwise is less than what fp16 does to fp32 (0.05 levels on a CPU).
    assert np.abs(_draw("cuda", "fp16", offload) - _draw("cuda", "fp16")).mean() < 0.05


def test_each_mode_takes_less_of_the_device_than_the_one_before() -> None:
    peaks: dict[str, int] = {}
    for offload in OFFLOADS:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        _draw("cuda", "fp16", offload)
        peaks[offload] = torch.cuda.max_memory_allocated()
    assert peaks["resident"] > peaks["idle"] > peaks["sequential"]


def test_what_waits_at_home_is_pinned_and_nothing_of_it_stays_behind() -> None:
    model = load_model(shipped_model(), "cuda", "fp16", offload="sequential")
    before = torch.cuda.memory_allocated()
    Engine(model).render(REQUESTS[:1])
    parameters = [parameter for module in model.modules.values() for parameter in module.parameters()]
    assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in parameters)
    assert torch.cuda.memory_allocated() - before < sum(parameter.nbytes for parameter in parameters)


def test_a_step_never_waits_for_the_device() -> None:
    engine = Engine(load_model(shipped_model(), "cuda", "fp16"))
    for request in REQUESTS:  # one of them draws noise at each step
        engine.add(request)
    engine.step()
    torch.cuda.set_sync_debug_mode("error")
    rows = engine.packer.pack()
    try:
        engine.runner.denoise(rows, engine.packer.too_large)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [row.error for row in rows] == [None, None]  # a wait is an error, and the rows' own
