"""A fresh process of `benchmarks.cold`: what it measures of itself. Imports nothing heavy: its clock is running.

Both `cold_ours` and `cold_reference` are this, each with its own way to load a model and to draw a picture. The process
is told by its argument what to do, and answers with one line of JSON: moments on the machine's monotonic clock, bytes.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A page of 4 KB has at least so many numbers, whatever the dtype.
_PAGE = 1024


@dataclass(frozen=True, slots=True)
class Told:
    """What to do. task: "picture" or "load". side: of the picture in pixels; None: as it comes. warm: a small model,
    loaded before the clock starts; None: none is.

    Without it, what is imported or made on first use counts as loading.
    """

    task: str
    path: str
    dtype: str
    tokenizer: str
    warm: str | None = None
    side: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Moments: the imports were done, the call to load began and returned, every weight was touched, the end.

    before: resident memory before loading; peak: the most of it until every weight was touched; drawn_peak: until the
    end. weights: their size.
    read: what came from the disk while loading; None where the kernel does not tell.
    """

    imported: float
    began: float
    loaded: float
    touched: float
    ended: float
    before: int
    peak: int
    drawn_peak: int
    weights: int
    read: int | None


def answer(load: Callable[[str, str, str], tuple[Any, Iterable[Any]]], draw: Callable[[Any, int | None], None]) -> None:
    """Do what this process is told. load: (path, dtype, tokenizer) -> model, its tensors; draw: of a side."""
    imported = time.monotonic()
    told = Told(**json.loads(sys.argv[1]))
    if told.warm is not None:
        load(told.warm, told.dtype, told.tokenizer)
    Path("/proc/self/clear_refs").write_text("5", "ascii")  # the peak starts anew
    before, read_before = status("VmRSS"), _read()
    began = time.monotonic()
    model, tensors = load(told.path, told.dtype, told.tokenizer)
    loaded = time.monotonic()
    weights = sum(_touched(tensor) for tensor in tensors)
    touched = time.monotonic()
    peak, read = status("VmHWM"), _read()
    if told.task == "picture":
        draw(model, told.side)
    moments = Answer(
        imported, began, loaded, touched, time.monotonic(), before, peak, status("VmHWM"), weights,
        None if read is None or read_before is None else read - read_before,
    )  # fmt: skip
    print(json.dumps(asdict(moments)), flush=True)


def _touched(tensor: Any) -> int:
    """Read a number of each page, as the first step would: a tensor that is only mapped is not there yet."""
    tensor.detach().flatten()[::_PAGE].sum()
    return int(tensor.nbytes)


def status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def _read() -> int | None:
    """Bytes that this process had fetched from the disk."""
    try:
        found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text("ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1])
