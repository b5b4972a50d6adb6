"""How the C library hands memory to the threads of a worker. Where it is not glibc, nothing is done."""

import ctypes
import os
from typing import Any, Final

# Of glibc's malloc.h, with their values here.
_KEEP_ALL: Final = {
    -8: 1,  # M_ARENA_MAX: an arena of any thread but the first is made of parts of 64 MB, which go back when they empty
    -4: 0,  # M_MMAP_MAX: a block with pages of its own gives them back
    -1: -1,  # M_TRIM_THRESHOLD: so does the heap's end
}


def keep_freed_memory() -> bool:
    """Let what this process's threads free serve their next requests, and stay resident. False: not glibc.

    Call it before any thread begins: later ones would share out the arenas that there are, for good. A step makes and
    drops the same feature maps again and again; by default the system would clear their pages anew each time, which
    takes 1 to 8 % of the engine's CPU seconds.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in _KEEP_ALL.items())


def give_back_freed_memory() -> None:
    """Once: what loading a model took beside the weights."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
