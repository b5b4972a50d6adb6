"""How the C library hands memory to the threads of a worker."""

import ctypes
import os
from typing import Final

# Of glibc's malloc.h, with their values here.
_KEEP_ALL: Final = {
    -8: 1,  # M_ARENA_MAX: an arena of any thread but the first is made of parts of 64 MB, which go back when they empty
    -4: 0,  # M_MMAP_MAX: a block with pages of its own gives them back
    -1: -1,  # M_TRIM_THRESHOLD: so does the heap's end
}


def keep_freed_memory() -> bool:
    """Let what this process's threads free serve their next requests, and never go back to the system. False: not glibc.

    Call it before the threads begin. A step makes and drops the same feature maps again and again; by default the
    system would clear their pages anew each time, which takes 1 to 8 % of the engine's CPU seconds.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in _KEEP_ALL.items())
