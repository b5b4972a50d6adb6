"""Devices and dtypes: what may be asked for, and that only the networks leave float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.accounting import FusedAttention, LiveBytes
from benchmarks.memory import empty_model
from sd_engine import Engine, Model, Request, load_model
from sd_engine.devices import devices_here, pick_device, pick_dtype
from sd_engine.errors import InvalidDevice
from sd_engine.model import Configs
from tests.engine.half import cpu_with_units

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
APPLE, TWO_CARDS = ("cpu", "mps"), ("cpu", "cuda:0", "cuda:1")
HALVES = ("fp16", "bf16")


@pytest.fixture(autouse=True)
def with_units() -> Iterator[None]:
    """Half precision is half precision here, as on a GPU."""
    with cpu_with_units():
        yield


@pytest.mark.parametrize(
    ("name", "here", "expected"),
    [
        ("auto", TWO_CARDS, "cuda"),
        ("auto", APPLE, "mps"),
        ("auto", ("cpu",), "cpu"),
        ("auto", ("cpu", "mps", "cuda:0"), "cuda"),
        ("cuda:1", TWO_CARDS, "cuda:1"),
        ("cpu", TWO_CARDS, "cpu"),
        (torch.device("cuda", 0), TWO_CARDS, "cuda:0"),
    ],
)
def test_a_device_is_picked_from_what_is_here(name: str, here: Sequence[str], expected: str) -> None:
    assert pick_device(name, here) == torch.device(expected)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "meta", "CPU"])
def test_what_is_no_device_is_refused_with_what_is_allowed_and_what_is_here(name: str) -> None:
    with pytest.raises(InvalidDevice) as caught:
        pick_device(name, TWO_CARDS)
    assert str(caught.value) == (
        f"device={name!r} is not allowed: auto, cpu, mps, cuda or cuda:N; this machine has cpu, cuda:0, cuda:1"
    )


@pytest.mark.parametrize(
    ("name", "here"), [("cuda", APPLE), ("cuda:2", TWO_CARDS), ("cuda:1000000", TWO_CARDS), ("mps", TWO_CARDS)]
)
def test_a_device_that_is_not_here_is_refused_with_those_that_are(name: str, here: Sequence[str]) -> None:
    with pytest.raises(InvalidDevice) as caught:
        pick_device(name, here)
    assert str(caught.value) == (
        f"device={name!r} is not allowed: this machine has {', '.join(here)}; choose one of them, or auto"
    )


def test_this_machine_has_a_cpu_and_auto_is_one_of_its_devices() -> None:
    assert "cpu" in devices_here()
    assert pick_device("auto").type in {name.partition(":")[0] for name in devices_here()}


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("auto", CUDA, torch.float16),
        ("auto", CPU, torch.float32),
        ("auto", MPS, torch.float32),
        ("bf16", CPU, torch.bfloat16),
        ("fp32", CUDA, torch.float32),
        (torch.float16, CPU, torch.float16),
    ],
)
def test_a_dtype_is_the_one_named_or_the_device_s_usual(name: str, device: torch.device, expected: torch.dtype) -> None:
    assert pick_dtype(name, device) == expected


@pytest.mark.parametrize("name", ["half", "float16", torch.float64, torch.int8])
def test_any_other_dtype_is_refused(name: str) -> None:
    with pytest.raises(InvalidDevice, match="allowed: auto, fp32, fp16, bf16"):
        pick_dtype(name, CPU)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_picture_in_half_precision_is_almost_the_one_in_full(tiny_folder: Path, dtype: str) -> None:
    requests = [Request("a red cat", seed=3, steps=4), Request("a star", seed=4, steps=4, init_image=_grey())]
    half = Engine(load_model(tiny_folder, dtype=pick_dtype(dtype, CPU))).render(requests)
    full = Engine(load_model(tiny_folder)).render(requests)
    for a, b in zip(half, full, strict=True):
        # bf16 keeps 8 bits of a number, and a network of random weights does not forgive: far off would be a bug, a
        # few levels are rounding.
        assert np.abs(a.astype(int) - b.astype(int)).mean() < 2


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_s_state_is_float32_whatever_the_model_computes_in(tiny_folder: Path, dtype: str) -> None:
    engine = Engine(load_model(tiny_folder, dtype=pick_dtype(dtype, CPU)))
    engine.add(Request("a red cat", seed=3, steps=4, sampler="euler_a"))
    engine.step()
    (row,) = engine._rows.values()
    assert row.state is not None and row.state.dtype == torch.float32
    assert row.noise is not None and row.noise.draw((2,)).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
def test_outside_the_network_a_step_computes_nothing_in_half_precision(tiny_folder: Path, dtype: str) -> None:
    """Guidance amplifies differences and steps add up: in half precision both would lose what the network found."""
    model = load_model(tiny_folder, dtype=pick_dtype(dtype, CPU))
    engine = Engine(model)
    engine.render([Request("warm up", steps=1)])
    engine.add(Request("a red cat", steps=4, guidance_rescale=0.5, sampler="euler_a"))
    engine.add(Request("a star", steps=4, guidance=None, sampler="dpmpp_2m_karras"))
    engine.step()
    with _outside(model.unet) as half_operations:
        engine.step()
    moving = {
        "_to_copy",
        "to",
        "cat",
        "stack",
        "select",
        "slice",
        "index",
        "expand",
        "view",
        "clone",
        "detach",
        "alias",
    }
    assert set(half_operations) <= moving
    assert half_operations["_to_copy"] + half_operations["to"] > 0, "the latent goes in in half precision"


def test_the_timestep_s_sinusoids_are_computed_in_float32(tiny_folder: Path) -> None:
    """A timestep of 999 has no exact form in bf16: its angle would be wrong by up to four radians."""
    model = load_model(tiny_folder, dtype=torch.bfloat16)
    seen: list[Tensor] = []
    model.unet.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    Engine(model).render([Request("a red cat", steps=2)])
    assert {t_U.dtype for t_U in seen} == {torch.float32}


@pytest.mark.parametrize(
    "request_",
    [
        Request("a red cat", steps=3, sampler="dpmpp_2m_karras", guidance_rescale=0.5),
        Request("a red cat", steps=3, sampler="euler_a", init_image=np.zeros((64, 64, 3), np.uint8)),
        Request("a red cat", steps=3, guidance=None, upscale=1.5, upscale_steps=2),
        Request(
            "a cat",
            steps=3,
            init_image=np.zeros((64, 64, 3), np.uint8),
            mask=np.full((64, 64), 255, np.uint8),
            mask_blur=2.0,
        ),
    ],
    ids=["text", "picture", "upscale", "mask"],
)
def test_no_float64_tensor_reaches_the_device(tiny_folder: Path, request_: Request) -> None:
    """Apple's GPUs have no float64: one such tensor, and nothing would be drawn there."""
    meter = LiveBytes()
    engine = Engine(empty_model(configs_of(load_model(tiny_folder)), torch.float32, "resident"))
    with meter, FusedAttention():
        engine.render([request_])
    assert torch.float32 in meter.dtypes and torch.float64 not in meter.dtypes


def configs_of(model: Model) -> Configs:
    """What a loaded model is made of."""
    return Configs(model.text_encoder.config, model.unet.config, model.vae.config, model.schedule)


def _grey() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((64, 64, 3), 128, np.uint8)


class _HalfOperations(TorchDispatchMode):
    """Counts the operations that give a half precision tensor, by name, but for those inside a module."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        halves = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype in (torch.half, torch.bfloat16)]
        if halves and not self.inside:
            self.counts[func.overloadpacket.__name__] += 1
        return result


@contextmanager
def _outside(module: nn.Module) -> Iterator[Counter[str]]:
    mode = _HalfOperations()

    def enter(*_: object) -> None:
        mode.inside = True

    def leave(*_: object) -> None:
        mode.inside = False

    hooks = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with mode:
        yield mode.counts
    for hook in hooks:
        hook.remove()
