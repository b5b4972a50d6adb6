"""Pour a component's tensors into a module built on `meta`: strictly, and without needing memory twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sd_engine.errors import WeightsError
from sd_engine.finite import holds, is_finite, refusal
from sd_engine.keymaps import KeyMap, Place
from sd_engine.offload import Component
from sd_engine.tensorfile import TensorFile, listed


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one component: `names` are the file's keys, with the name that `keymap` knows each by."""

    component: Component
    file: TensorFile
    names: Mapping[str, str]
    keymap: KeyMap
    naming: str

    @property
    def wanted(self) -> list[str]:
        """The keys whose tensors have a place in the component; a few buffers have none."""
        return [key for key, name in self.names.items() if self.keymap.places(name)]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of a file, and which part of it is wanted."""

    key: str
    place: Place


class Uninitialized(TorchFunctionMode):
    """Modules made within keep the numbers that they happen to be made with: a file's come in their place.

    On `meta` there is nothing to initialize either, but PyTorch finds that out anew, slowly, for each parameter.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Skip what fills a tensor in place: its first argument, which some callers name."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALIZERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


_INITIALIZERS = frozenset({"uniform_", "normal_", "fill_", "zero_", "kaiming_uniform_"})


def fill(module: nn.Module, part: Part, device: torch.device, dtype: torch.dtype) -> None:
    """Assign the tensors of `part` to `module`, converted. One that needs no conversion stays mapped from its file.

    Raises WeightsError that lists what is missing, unexpected, doubled or of another shape; or of what is converted and
    not finite. What needs no conversion is `looked_at` by who calls this.
    """
    sources = matched(module, part)
    # In the order of the file: it is then read from front to end.
    state = {ours: _poured(part, ours, source, module, device, dtype) for ours, source in sources.items()}
    module.load_state_dict(state, strict=True, assign=True)


def matched(module: nn.Module, part: Part) -> dict[str, Source]:
    """Our name -> where its tensor is. Reads no tensor; raises WeightsError where names and shapes do not fit."""
    expected = {ours: tuple(parameter.shape) for ours, parameter in module.state_dict().items()}
    sources, doubled = _sources(part)
    problems = [
        listed("missing", (ours for ours in expected if ours not in sources)),
        listed("unexpected", (source.key for ours, source in sources.items() if ours not in expected)),
        listed("doubled", doubled),
        listed("wrong shape", _misfits(expected, sources, part)),
        listed("not of floating point", _not_floating(sources, part.file)),
    ]
    if any(problems):
        raise WeightsError(f"{part.file.path} does not fit its configuration: {'; '.join(filter(None, problems))}")
    return sources


def _sources(part: Part) -> tuple[dict[str, Source], list[str]]:
    """Our name -> its source, and the keys that came to a name already taken."""
    sources: dict[str, Source] = {}
    doubled = []
    for key, name in part.names.items():
        for place in part.keymap.places(name):
            if place.ours in sources:
                doubled.append(key)
            else:
                sources[place.ours] = Source(key, place)
    return sources, doubled


def _misfits(expected: Mapping[str, tuple[int, ...]], sources: Mapping[str, Source], part: Part) -> Iterator[str]:
    for ours, source in sources.items():
        shape, parts = part.file.shape(source.key), source.place.parts
        wanted = expected.get(ours)
        if wanted is None:
            continue
        stacked = (parts * wanted[0], *wanted[1:])
        if shape != stacked and not (part.keymap.is_squeezed(ours) and shape == (*wanted, 1, 1)):
            yield f"{source.key} {list(shape)} instead of {list(stacked)}"


def _not_floating(sources: Mapping[str, Source], file: TensorFile) -> Iterator[str]:
    for source in sources.values():
        dtype = file.dtype(source.key)
        if not dtype.is_floating_point:
            yield f"{source.key} ({dtype})"


def _poured(
    part: Part, ours: str, source: Source, module: nn.Module, device: torch.device, dtype: torch.dtype
) -> Tensor:
    read = part.file.tensor(source.key)
    piece = read if source.place.parts == 1 else read.chunk(source.place.parts)[source.place.part]
    tensor = piece.reshape(module.get_parameter(ours).shape).to(device, dtype).contiguous()
    # Before widening there are fewer bytes to look at; narrowing may lose what is too large.
    if read.dtype != dtype and not is_finite(piece if holds(dtype, read.dtype) else tensor):
        raise refusal(part.file, source.key, dtype)
    if tensor.untyped_storage().data_ptr() != read.untyped_storage().data_ptr():
        part.file.forget(source.key, read)
    return tensor
