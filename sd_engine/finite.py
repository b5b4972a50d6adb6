"""Whether the numbers of a file are finite: a damaged file must not become black pictures.

Tensors that stay as they are in their file are looked at on a thread beside the one that builds the modules, and by one
look for all that lie one behind the other there: a look for each shares a few numbers out among the threads a thousand
times, and that takes seconds while other programs use the cores. Those that are converted are looked at on their way.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from threading import Event
from typing import Final

import torch
from torch import Tensor

from sd_engine.errors import WeightsError
from sd_engine.tensorfile import TensorFile

# Numbers of one look, after which an error elsewhere is heard: on a slow disk they take a fraction of a second.
_AT_ONCE: Final = 2**27


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. By the extremes: they carry NaN along, and need no memory."""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # PyTorch finds no extremes of float8; all of its numbers are float16's too
    return all(math.isfinite(extreme) for extreme in tensor.aminmax()) if tensor.numel() else True


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether all that is finite in one dtype is so in the other."""
    return torch.finfo(wide).max >= torch.finfo(narrow).max


def refusal(file: TensorFile, key: str, dtype: torch.dtype) -> WeightsError:
    """Why a tensor is not finite in this dtype: the file's fault, or that of a smaller range."""
    if is_finite(file.tensor(key)):
        why = f"{key} has numbers too large for {dtype}; load the model in float32 or bfloat16"
    else:
        why = f"{key} has numbers that are not finite (NaN or infinity), the file is damaged; download it again"
    return WeightsError(f"{file.path}: {why}")


@contextmanager
def looked_at(files: Iterable[tuple[TensorFile, Iterable[str]]], dtype: torch.dtype) -> Iterator[None]:
    """Look at those of the keys of each file that are of this dtype, while the block runs.

    Raises WeightsError at the block's end for the first that is not finite. An error of the block ends the looking.
    """
    abandoned = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="finite") as pool:
        try:
            looks = [pool.submit(_check, file, _of_dtype(file, keys, dtype), abandoned) for file, keys in files]
            yield
            for look in looks:
                look.result()
        except BaseException:
            abandoned.set()
            raise


def _of_dtype(file: TensorFile, keys: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors: not taken by the thread, which would wait for Python's lock a thousand times."""
    return {key: file.tensor(key) for key in keys if file.dtype(key) == dtype}


def _check(file: TensorFile, tensors: Mapping[str, Tensor], abandoned: Event) -> None:
    for run in _runs(tensors):
        for part in _joined([tensors[key] for key in run]).split(_AT_ONCE):
            if abandoned.is_set():
                return
            if not is_finite(part):
                key = next(key for key in run if not is_finite(tensors[key]))
                raise refusal(file, key, tensors[key].dtype)


def _runs(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The keys, parted where a tensor does not begin at the end of the one before; without those of no numbers."""
    keys = sorted((key for key in tensors if tensors[key].numel()), key=lambda key: tensors[key].data_ptr())
    runs = [keys[:1]] if keys else []
    for before, key in pairwise(keys):
        if _follows(tensors[before], tensors[key]):
            runs[-1].append(key)
        else:
            runs.append([key])
    return runs


def _follows(before: Tensor, tensor: Tensor) -> bool:
    """Whether one begins where the other ends. A pickle also has views, whose size does not say where that is."""
    whole = before.is_contiguous() and tensor.is_contiguous()
    return whole and before.data_ptr() + before.nbytes == tensor.data_ptr()


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one dtype that lie one behind the other in memory, as one; it must not outlive them."""
    if len(tensors) == 1:
        return tensors[0].flatten()
    memory = (ctypes.c_byte * sum(tensor.nbytes for tensor in tensors)).from_address(tensors[0].data_ptr())
    return torch.frombuffer(memory, dtype=tensors[0].dtype)
