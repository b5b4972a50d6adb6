"""Offload: weights that wait on the CPU come for their work, go again, and change no picture.

Where weights are is looked at on PyTorch's `meta` device, which is another device than the CPU on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.accounting import META, FusedAttention, LiveBytes
from benchmarks.memory import empty_model
from sd_engine import Engine, Model, Request, load_model
from sd_engine.errors import InvalidDevice
from sd_engine.model import Configs
from sd_engine.offload import OFFLOADS, Component, Offload, Place, Visitor

CPU = torch.device("cpu")
COMPONENTS: tuple[Component, ...] = ("text_encoder", "unet", "vae")
GREY = np.full((64, 64, 3), 128, np.uint8)


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


@pytest.fixture
def configs(tiny: Model) -> Configs:
    return Configs(tiny.text_encoder.config, tiny.unet.config, tiny.vae.config, tiny.schedule)


@pytest.mark.parametrize("offload", ["idle", "sequential"])
def test_no_bit_of_a_picture_depends_on_the_mode(tiny_folder: Path, tiny: Model, offload: Offload) -> None:
    requests = [
        Request("a red cat", seed=1, steps=3),
        Request("a star", seed=2, steps=4, guidance=None, sampler="euler_a"),
        Request("a cat", seed=3, steps=4, init_image=GREY),
    ]
    expected = Engine(tiny).render(requests)
    pictures = Engine(load_model(tiny_folder, offload=offload)).render(requests)
    for picture, other in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(picture, other)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_after_loading_and_between_pictures_only_what_must_be_is_on_the_device(
    configs: Configs, offload: Offload
) -> None:
    model = empty_model(configs, torch.float32, offload)
    at_rest = _at_rest(offload)
    homes = [id(parameter) for module in model.modules.values() for parameter in module.parameters()]
    for request in (Request("a red cat", steps=2), Request("a cat", steps=3, init_image=GREY)):
        assert _places(model) == {component: {device} for component, device in at_rest.items()}
        with LiveBytes(), FusedAttention():
            Engine(model).render([request])
    assert _places(model) == {component: {device} for component, device in at_rest.items()}
    assert homes == [id(parameter) for module in model.modules.values() for parameter in module.parameters()]


def test_what_waits_in_each_mode() -> None:
    waiting = {
        offload: [component for component, device in _at_rest(offload).items() if device == CPU] for offload in OFFLOADS
    }
    assert waiting == {"resident": [], "idle": ["text_encoder", "vae"], "sequential": ["text_encoder", "unet", "vae"]}


def test_a_component_is_on_the_device_until_the_last_of_nested_visits_ends(configs: Configs) -> None:
    model = empty_model(configs, torch.float32, "idle")
    with model.at_work("vae"):
        with model.at_work("vae"):
            assert _places(model)["vae"] == {META}
        assert _places(model)["vae"] == {META} and _places(model)["text_encoder"] == {CPU}
    assert _places(model)["vae"] == {CPU}


def test_in_sequential_at_most_one_layer_of_the_unet_is_on_the_device(configs: Configs) -> None:
    model = empty_model(configs, torch.float32, "sequential")
    layers = [layer for layer in model.unet.modules() if next(layer.parameters(recurse=False), None) is not None]
    visiting: list[list[nn.Module]] = []

    def look(called: nn.Module, _: object, __: object) -> None:
        visiting.append([layer for layer in layers if _place(layer) == META])
        assert visiting[-1] == [called]

    for layer in layers:
        layer.register_forward_hook(look, prepend=True)
    with LiveBytes(), FusedAttention():
        Engine(model).render([Request("a red cat", steps=1)])
    assert len(visiting) >= len(layers)


def test_a_layer_that_fails_goes_home(configs: Configs) -> None:
    model = empty_model(configs, torch.float32, "sequential")
    with model.at_work("unet"), pytest.raises(RuntimeError):
        model.unet.conv_in(torch.empty(1, 3, 8, 8, device=META))
    assert _places(model)["unet"] == {CPU}


def test_when_memory_runs_out_on_the_way_everything_is_still_at_home(configs: Configs) -> None:
    model = empty_model(configs, torch.float32, "idle")
    with _Full(after=5), pytest.raises(torch.OutOfMemoryError), model.at_work("vae"):
        pytest.fail("there was no room")
    assert _places(model)["vae"] == {CPU}
    with model.at_work("vae"):
        assert _places(model)["vae"] == {META}


def test_a_layer_for_which_there_is_no_room_can_be_called_again(configs: Configs) -> None:
    model = empty_model(configs, torch.float32, "sequential")
    latent = torch.empty(1, 4, 8, 8, device=META)
    with _Full(after=1), pytest.raises(torch.OutOfMemoryError):
        model.unet.conv_in(latent)
    assert _places(model)["unet"] == {CPU}
    assert model.unet.conv_in(latent).device == META
    assert _places(model)["unet"] == {CPU}


def test_two_models_may_share_their_parts(configs: Configs) -> None:
    first = empty_model(configs, torch.float32, "sequential")
    second = replace(first, name="second")
    with LiveBytes(), FusedAttention():
        Engine({"first": first, "second": second}).render(
            [Request("a red cat", steps=1, model="first"), Request("a red cat", steps=1, model="second")]
        )
    assert _places(first) == {component: {CPU} for component in COMPONENTS}


def test_a_visit_copies_nothing_back() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    home = layer.weight
    with Visitor(layer, META).visit():
        assert layer.weight is not home
    assert layer.weight is home and layer.weight.data_ptr() == home.data_ptr()


def test_an_unknown_mode_is_refused_with_those_that_are(tiny: Model) -> None:
    with pytest.raises(InvalidDevice) as caught:
        replace(tiny, offload="lazy")  # type: ignore[arg-type]
    assert str(caught.value) == "offload='lazy' is not allowed: resident, idle, sequential"


def _at_rest(offload: Offload) -> dict[Component, torch.device]:
    return {component: Place(META, torch.float32, offload).at_rest(component)[0] for component in COMPONENTS}


def _places(model: Model) -> Mapping[Component, set[torch.device]]:
    return {name: {parameter.device for parameter in module.parameters()} for name, module in model.modules.items()}


def _place(layer: nn.Module) -> torch.device:
    return next(layer.parameters(recurse=False)).device


class _Full(TorchDispatchMode):
    """A device whose memory runs out: after so many new tensors, no other."""

    def __init__(self, after: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = after

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device == META and func is torch.ops.aten._to_copy.default:
            self.room -= 1
            if self.room < 0:
                raise torch.OutOfMemoryError("no room")
        return result
