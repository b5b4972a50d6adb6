"""How the C library hands memory to the threads of a worker."""

import ctypes
import os
from typing import Final

_M_ARENA_MAX: Final = -8  # of glibc's malloc.h


def share_one_arena() -> bool:
    """Let all threads that begin from now on take their memory where the first one does. False: not glibc.

    Each thread has an arena of its own otherwise, and only the first one's keeps large blocks for the next request: the
    engine's thread would give feature maps back to the system and fault their pages in anew, layer by layer.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and mallopt(_M_ARENA_MAX, 1) == 1
