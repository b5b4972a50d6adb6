"""Safetensors files: opened by mapping them into memory, and poured strictly into a module built on `meta`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sd_engine.errors import WeightsError
from sd_engine.keymaps import KeyMap

_LISTED_KEYS = 8  # of each kind of trouble: a wrong file has hundreds of wrong keys


class TensorFile:
    """An open safetensors file; a tensor is read when it is asked for."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.keys: tuple[str, ...] = tuple(handle.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape as the header has it; reads no tensor."""
        return tuple(self._handle.get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        """The tensor, on the CPU, in the file's dtype, still mapped: copied by whoever converts it."""
        tensor: Tensor = self._handle.get_tensor(key)
        return tensor


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Raises WeightsError for one that is torn, cut short, or something else."""
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    with handle as entered:
        yield TensorFile(path, entered)


def fill(
    module: nn.Module,
    file: TensorFile,
    names: Mapping[str, str],
    keymap: KeyMap,
    place: tuple[torch.device, torch.dtype],
) -> None:
    """Assign the file's tensors to `module`; `names` are its keys, with the name that `keymap` knows each by.

    Raises WeightsError that lists what is missing, unexpected, doubled or of another shape.
    """
    expected = {ours: tuple(parameter.shape) for ours, parameter in module.state_dict().items()}
    sources, doubled = _sources(names, keymap)
    shapes = {ours: _shape(file.shape(key), keymap.is_squeezed(ours)) for ours, key in sources.items()}
    problems = [
        listed("missing", (ours for ours in expected if ours not in sources)),
        listed("unexpected", (key for ours, key in sources.items() if ours not in expected)),
        listed("doubled", doubled),
        listed("wrong shape", _misfits(expected, shapes, sources)),
    ]
    if any(problems):
        raise WeightsError(f"{file.path} does not fit its configuration: {'; '.join(filter(None, problems))}")
    state = {ours: file.tensor(key).reshape(expected[ours]).to(*place) for ours, key in sources.items()}
    module.load_state_dict(state, strict=True, assign=True)


def _sources(names: Mapping[str, str], keymap: KeyMap) -> tuple[dict[str, str], list[str]]:
    """Our name -> the file's key, and the keys that came to a name already taken."""
    sources: dict[str, str] = {}
    doubled = []
    for key, name in names.items():
        ours = keymap.rename(name)
        if ours in sources:
            doubled.append(key)
        elif ours is not None:
            sources[ours] = key
    return sources, doubled


def _shape(shape: tuple[int, ...], squeezed: bool) -> tuple[int, ...]:
    return shape[:2] if squeezed and shape[2:] == (1, 1) else shape


def _misfits(
    expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, str]
) -> Iterator[str]:
    for ours, shape in shapes.items():
        wanted = expected.get(ours, shape)
        if shape != wanted:
            yield f"{sources[ours]} {list(shape)} instead of {list(wanted)}"


def listed(kind: str, entries: Iterable[str]) -> str:
    """'3 missing: a, b, c', cut after a few; empty for none."""
    entries = list(entries)
    if not entries:
        return ""
    more = f", and {len(entries) - _LISTED_KEYS} more" if len(entries) > _LISTED_KEYS else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:_LISTED_KEYS])}{more}"
