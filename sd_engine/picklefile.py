"""Pickled checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`), read without running any of what a pickle can run.

Only torch's restricted unpickler reads them (`weights_only=True`): it knows tensors and plain containers, and refuses
everything else before it is called. Files in torch's zip format are mapped into memory, tensors are read when they are
asked for; those from before torch 1.6 are read as a whole.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.serialization import safe_globals

from sd_engine.errors import WeightsError
from sd_engine.tensorfile import TensorFile, listed

SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".bin")
PICKLE_LIMIT: Final = 64 * 2**20  # the pickle alone, without its tensors; a real one has under a megabyte
_NESTED: Final = 8  # `state_dict` in `state_dict`; real files have one or two, a crafted one holds itself


class Inert:
    """Stands for what an original checkpoint names beside its tensors: keeps nothing, does nothing."""

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, ignored: object) -> None:
        pass


# The original files of SD 1.x carry the state of their training's callbacks and a score, under these names.
_INERT: Final = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


class PickleFile(TensorFile):
    """The tensors of a pickled checkpoint; `hints` is what is beside them (a step counter)."""

    def __init__(self, path: Path, content: Mapping[str, Any], hints: Mapping[str, object], mapped: bool) -> None:
        self.path = path
        self.hints = hints
        self._tensors = {key: value.detach() for key, value in content.items() if isinstance(value, Tensor)}
        self._mapped = mapped
        self.keys = tuple(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """As the pickle has it."""
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        """As the pickle has it."""
        return self._tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        """The tensor; mapped if the file is a zip."""
        return self._tensors[key]

    def forget(self, key: str, tensor: Tensor) -> None:
        """Only what is mapped can be read again, and a view with gaps does not say where it ends."""
        if self._mapped and tensor.is_contiguous():
            super().forget(key, tensor)


@contextmanager
def opened_pickle(path: Path) -> Iterator[TensorFile]:
    """Open a pickled checkpoint. Raises WeightsError for one with code in it, torn, or something else."""
    content = unpickled(path)
    hints: dict[str, object] = {}
    for _ in range(_NESTED):
        if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
            hints |= _beside(content)
            content = content["state_dict"]
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not tensors by name; it is no model")
    odd = [str(key) for key, value in content.items() if isinstance(value, Tensor) and not is_plain(value)]
    if odd:
        raise WeightsError(
            f"{path} keeps its numbers in a form that no model is computed in (sparse, quantized or left out): "
            f"{listed('tensors', odd)}; take its .safetensors file instead"
        )
    yield PickleFile(path, {str(key): value for key, value in content.items()}, hints | _beside(content), _is_zip(path))


def is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are all there, one after the other."""
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return strided and tensor.device.type == "cpu" and not tensor.is_quantized


def _beside(content: Mapping[Any, Any]) -> dict[str, object]:
    """What there is beside tensors: plain values, and of others their names alone."""
    others = {str(key): value for key, value in content.items() if not isinstance(value, Tensor)}
    return {key: value if isinstance(value, str | int | float) else None for key, value in others.items()}


def _is_zip(path: Path) -> bool:
    """By its first bytes, as torch decides: a zip may have anything before its directory, and torch would read that."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _check_zip(path: Path) -> None:
    """Refuse what would be unpacked rather than mapped: a few bytes could ask for any amount of memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # a damaged directory is met anywhere in the reader, as half a dozen kinds
        raise WeightsError(f"{path} is not a whole checkpoint ({error}); download it again") from error
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    large = [entry.filename for entry in entries if entry.filename.endswith(".pkl") and entry.file_size > PICKLE_LIMIT]
    if packed or large:
        what = f"compresses {packed[0]}" if packed else f"has {large[0]} of more than {PICKLE_LIMIT} bytes"
        raise WeightsError(f"{path} {what}, as no checkpoint of torch does; take it from another source")


def unpickled(path: Path, *allowed: type) -> Any:
    """What a pickle holds, its tensors mapped if it is a zip; `allowed`: classes beside tensors and plain containers.

    Raises WeightsError for one with code in it, torn, or something else.
    """
    mapped = _is_zip(path)
    if mapped:
        _check_zip(path)
    try:
        with safe_globals([*allowed, *((Inert, name) for name in _INERT)]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual protocol: it is read, or refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a torn or crafted pickle makes the unpickler stumble anywhere
        raise WeightsError(_refusal(path, str(error))) from error


def _refusal(path: Path, said: str) -> str:
    asked = re.search(r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL|callable:) ([\w.]+)", said)
    if asked:
        return (
            f"{path} is refused: beside tensors its pickle asks for {asked[1]}, and a pickle can run any program; "
            "take its .safetensors file instead"
        )
    lines = [line.strip() for line in said.rpartition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    reason = lines[0][:160] if lines else "it ends early"
    return (
        f"{path} is not a whole checkpoint, or holds more than tensors (torch: {reason}); download it again, or take "
        "its .safetensors file"
    )
