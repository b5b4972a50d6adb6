"""Where weights wait: a model larger than the device's memory keeps some at home, on the CPU, until there is work.

`resident`: all weights stay on the device, and on a CPU what makes convolutions fast is kept beside them. `idle`: the
text encoder and the VAE wait at home, the U-Net stays, with its weights alone. `sequential`: the U-Net waits too, and
its layers visit the device one by one during a forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from sd_engine.devices import pick_device, pick_dtype, working_dtype
from sd_engine.errors import InvalidDevice

Component = Literal["text_encoder", "unet", "vae", "tiny_decoder"]
Offload = Literal["resident", "idle", "sequential"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)

_HOME = torch.device("cpu")
_WAITING: Mapping[Offload, tuple[Component, ...]] = {
    "resident": (),
    "idle": ("text_encoder", "vae"),
    "sequential": ("text_encoder", "vae", "unet"),
}


@dataclass(frozen=True, slots=True)
class Place:
    """The device that a model computes on, the dtype that its weights rest in, and its mode of offload."""

    device: torch.device
    dtype: torch.dtype
    offload: Offload

    @classmethod
    def pick(cls, device: str | torch.device, dtype: str | torch.dtype, offload: str) -> Place:
        """From names. Raises InvalidDevice for what does not exist, and for a device that is not here."""
        picked = pick_device(device)
        return cls(picked, pick_dtype(dtype, picked), check_offload(offload))

    @property
    def works_in(self) -> torch.dtype:
        """The dtype of activations."""
        return working_dtype(self.dtype, self.device)

    def at_rest(self, component: Component) -> tuple[torch.device, torch.dtype]:
        """Where and in which dtype a component's weights are while nobody works with them: there they are loaded."""
        return _HOME if component in _WAITING[self.offload] else self.device, self.dtype


def check_offload(name: str) -> Offload:
    """The mode of that name. Raises InvalidDevice for one that does not exist."""
    for offload in OFFLOADS:
        if name == offload:
            return offload
    raise InvalidDevice("offload", name, ", ".join(OFFLOADS))


class Visitor:
    """The weights of a module that live on the CPU and visit the device while somebody works with them.

    Weights are frozen, so a visit ends by dropping the device's copy: nothing travels back. Visits may be nested.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device
        self._visits = 0
        self._home: list[tuple[nn.Module, str, nn.Parameter]] = []

    def enter(self) -> None:
        """Bring the weights to the device, unless they are there. If memory runs out, they are all still at home."""
        if self._visits == 0:
            home = list(_parameters(self.module))
            copies = [_visiting(parameter, self.device) for *_, parameter in home]
            for (layer, name, _), copy in zip(home, copies, strict=True):
                setattr(layer, name, copy)
            self._home = home
        self._visits += 1

    def leave(self) -> None:
        """Put back what was at home, when the last visit ends."""
        if self._visits == 0:
            return  # PyTorch calls a hook that always runs after a visit that could not begin, too
        self._visits -= 1
        if self._visits == 0:
            for layer, name, parameter in self._home:
                setattr(layer, name, parameter)
            self._home = []

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Inside, the weights are on the device."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


def visitors(
    modules: Mapping[Component, nn.Module], device: torch.device, offload: Offload
) -> dict[Component, Visitor]:
    """Of the components that wait at home, those that come as a whole; the U-Net's layers come when they are called."""
    waiting = {name: modules[name] for name in _WAITING[offload]}
    if "unet" in waiting:
        _stream(waiting.pop("unet"), device)
    return {name: Visitor(module, device) for name, module in waiting.items()}


def pin(modules: Mapping[Component, nn.Module], device: torch.device, offload: Offload) -> None:
    """Lock the pages of what waits at home for a CUDA device: their copies then need not wait for each other."""
    if device.type != "cuda":
        return
    for name in _WAITING[offload]:
        for layer, key, parameter in _parameters(modules[name]):
            setattr(layer, key, nn.Parameter(parameter.data.pin_memory(), requires_grad=False))


def _stream(module: nn.Module, device: torch.device) -> None:
    """Let every layer with weights visit the device for the time of its own call.

    Layers rather than whole blocks: a block's layer may be called alone (the texts' keys and values are), and one that
    is not called then costs no copy.
    """
    for layer in module.modules():
        if next(layer.parameters(recurse=False), None) is not None:
            _let_visit(layer, Visitor(layer, device))


def _let_visit(layer: nn.Module, visitor: Visitor) -> None:
    layer.register_forward_pre_hook(lambda *_: visitor.enter())
    # The last to enter is the first to leave, also where two models share a module.
    layer.register_forward_hook(lambda *_: visitor.leave(), prepend=True, always_call=True)


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            yield layer, name, parameter


def _visiting(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    return nn.Parameter(parameter.data.to(device, non_blocking=True), requires_grad=False)
