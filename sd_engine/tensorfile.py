"""A file of tensors, whatever its format: names, shapes and dtypes without reading, each tensor when it is asked for.

A safetensors file is a header of JSON, its length in the first eight bytes, and the tensors behind it. Files are mapped
into memory: a tensor that stays as it is in the file costs no copy, and processes that load the same file share it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd_engine.errors import WeightsError

# Far above any real header (SDXL's 2600 tensors with a merge's history: half a megabyte), far below any harm: a header
# of the limit is read in half a second.
HEADER_LIMIT: Final = 8 * 2**20
TENSOR_LIMIT: Final = 20_000
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMED_KEYS: Final = 8  # of each kind of trouble: a wrong file has hundreds of wrong keys


class TensorFile(ABC):
    """An open file of tensors. `hints` is what it says about the model besides: a step counter, a prediction."""

    path: Path
    keys: tuple[str, ...]
    hints: Mapping[str, object]

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape; reads no tensor."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """The tensor's dtype; reads no tensor."""

    @abstractmethod
    def tensor(self, key: str) -> Tensor:
        """The tensor, on the CPU, as it is in the file: mapped, so copied by whoever converts it."""

    def forget(self, key: str, tensor: Tensor) -> None:
        """Take the tensor of `key`, that was copied, out of this process's memory; if need be it is read again."""
        forget(tensor)


class SafetensorsFile(TensorFile):
    """An open safetensors file."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self._mapped: dict[str, Tensor] = {}
        self.keys = tuple(handle.keys())
        self.hints = handle.metadata() or {}

    def shape(self, key: str) -> tuple[int, ...]:
        """As the header has it."""
        return tuple(self._handle.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        """As the header has it. Raises WeightsError for one that is not known."""
        name = self._handle.get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise WeightsError(f"{self.path}: {key} has the dtype {name}, which is none of {', '.join(_DTYPES)}")
        return _DTYPES[name]

    def tensor(self, key: str) -> Tensor:
        """The tensor, mapped: by the library once, which takes longer than all else that is done with a small one."""
        if key not in self._mapped:
            self._mapped[key] = self._handle.get_tensor(key)
        return self._mapped[key]


@contextmanager
def opened_safetensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Raises WeightsError for one that is torn, cut short, or something else.

    The header's length is held against the file and a limit before anything is allocated; offsets that overlap, leave
    holes or do not fit a tensor's shape are refused by the library when it opens the file.
    """
    _check_header(path)
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    with handle as entered:
        file = SafetensorsFile(path, entered)
        if len(file.keys) > TENSOR_LIMIT:
            raise WeightsError(
                f"{path} has {len(file.keys)} tensors, above the limit of {TENSOR_LIMIT}; it is no model that this "
                "engine could draw with: take it from another source"
            )
        yield file


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise WeightsError(f"{path} is not a whole safetensors file: its {size} bytes end early; download it again")
    if length > HEADER_LIMIT:
        raise WeightsError(
            f"{path} has a header of {length} bytes, above the limit of {HEADER_LIMIT}; it is no model that this "
            "engine could draw with: take it from another source"
        )


class Shards(TensorFile):
    """Several files of tensors that are one; `path` is the index that names them."""

    def __init__(self, path: Path, owners: Mapping[str, TensorFile]) -> None:
        self.path = path
        self._owners = owners
        self.keys = tuple(owners)
        self.hints = {}

    def shape(self, key: str) -> tuple[int, ...]:
        """As the shard has it."""
        return self._owners[key].shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """As the shard has it."""
        return self._owners[key].dtype(key)

    def tensor(self, key: str) -> Tensor:
        """The tensor, as its shard gives it."""
        return self._owners[key].tensor(key)

    def forget(self, key: str, tensor: Tensor) -> None:
        """As its shard can."""
        self._owners[key].forget(key, tensor)


def joined(path: Path, weight_map: Mapping[str, str], shards: Mapping[str, TensorFile]) -> Shards:
    """The files of an index as one. Raises WeightsError where the index and the files disagree."""
    there = {name: set(file.keys) for name, file in shards.items()}
    absent = [key for key, name in weight_map.items() if key not in there[name]]
    extra = [key for name, file in shards.items() for key in file.keys if weight_map.get(key) != name]
    if absent or extra:
        problems = "; ".join(filter(None, [listed("not where it says", absent), listed("not in it", extra)]))
        raise WeightsError(f"{path} does not fit its files: {problems}; download the folder again")
    return Shards(path, {key: shards[name] for key, name in weight_map.items()})


def _madvise() -> Any:
    """The C library's `madvise`; None where there is none (Windows)."""
    return getattr(ctypes.CDLL(None), "madvise", None) if os.name == "posix" else None


_MADVISE: Final = _madvise()


def forget(tensor: Tensor) -> None:
    """Drop the pages of a mapped tensor that is not used any more: what was read of a file counts as memory in use.

    Only whole pages inside the tensor, so that no other tensor's are touched.
    """
    if _MADVISE is None:
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        _MADVISE(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def listed(kind: str, entries: Iterable[str]) -> str:
    """'3 missing: a, b, c', cut after a few; empty for none."""
    entries = list(entries)
    if not entries:
        return ""
    more = f", and {len(entries) - _NAMED_KEYS} more" if len(entries) > _NAMED_KEYS else ""
    return f"{len(entries)} {kind}: {', '.join(entries[:_NAMED_KEYS])}{more}"
