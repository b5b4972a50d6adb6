"""Work for many rows at once that failed is done for each half: out of memory shrinks, a bad row fails alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

import torch

from sd_engine.errors import DeviceLost, OutOfMemory
from sd_engine.row import Row

# What allocators say that have no exception class of their own: the CPU's, and Apple's.
_MEMORY_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
)

# After these a process gets nothing but the same error of its device, for every row: CUDA's runtime API, "error types",
# those that leave "the process in an inconsistent state", and a device that is gone.
_LOST_WORDS = (
    "illegal memory access",
    "illegal instruction",
    "device-side assert",
    "unspecified launch failure",
    "launch timed out",
    "misaligned address",
    "invalid program counter",
    "hardware stack error",
    "operation not supported on global/shared address space",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "no CUDA-capable device",
)


def halving(
    work: Callable[[Sequence[Row]], None],
    rows: Sequence[Row],
    too_large: Callable[[Sequence[Row]], None] = lambda rows: None,
) -> None:
    """Do the work for all rows at once; if that fails, for each half, down to single rows, which get their `error`.

    too_large is told of every pack that memory did not suffice for. A row that does not fit alone fails with
    OutOfMemory. `work` must change no row unless it succeeds.
    Raises DeviceLost where no row can be blamed: the device failed, and would fail every one.
    """
    if not rows:
        return
    error = _attempt(work, rows)
    if error is None:
        return
    if is_out_of_memory(error):
        too_large(rows)
        _give_back()
    if len(rows) > 1:
        middle = len(rows) // 2
        halving(work, rows[:middle], too_large)
        halving(work, rows[middle:], too_large)
    else:
        rows[0].error = _out_of_memory(rows[0], error) if is_out_of_memory(error) else error


def _attempt(work: Callable[[Sequence[Row]], None], rows: Sequence[Row]) -> Exception | None:
    """What went wrong. Its frames are cleared: they hold the tensors of the failed call, which the halves need."""
    try:
        work(rows)
    except Exception as error:
        if is_device_lost(error):
            raise DeviceLost(f"the device is lost to this process: {str(error).splitlines()[0]}") from error
        traceback.clear_frames(error.__traceback__)
        return error
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of any device ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in _MEMORY_WORDS)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device will answer every later call with an error too."""
    said = str(error)
    return ("CUDA error" in said or "HIP error" in said) and any(word in said for word in _LOST_WORDS)


def _give_back() -> None:
    # What PyTorch keeps for later is of the sizes that just did not fit.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _out_of_memory(row: Row, error: Exception) -> OutOfMemory:
    said = OutOfMemory(
        f"not enough memory for one picture of {row.lane.width} x {row.lane.height} on this device; "
        "ask for a smaller one, or give the worker half precision, offload, or (if it is deterministic) fewer max_units"
    )
    said.__cause__ = error
    return said
