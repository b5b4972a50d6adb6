"""Contexts kept: the same negative prompt comes with nearly every job of a night."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

from sd_engine.context import Context

# A chunk of 77 tokens takes 7.7 MB for Stable Diffusion 1.x at float32: the keys and values of 16 layers.
DEFAULT_CACHE_BYTES: Final = 512 * 2**20


class ContextCache:
    """Holds contexts of at most so many bytes in all; the least recently used makes room. 0 keeps nothing.

    What a row holds while it is drawn is not counted: it is the row's, and stays when it leaves the cache.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"cache_bytes={max_bytes} is not allowed: 0, which keeps nothing, or more")
        self.max_bytes = max_bytes
        self.bytes = 0
        self._contexts: OrderedDict[Hashable, Context] = OrderedDict()

    def get(self, key: Hashable) -> Context | None:
        """The context kept under this key, now the most recently used."""
        if key not in self._contexts:
            return None
        self._contexts.move_to_end(key)
        return self._contexts[key]

    def put(self, key: Hashable, context: Context) -> None:
        """Keep a new context; one larger than all that may be kept would only drive out the others, and is not."""
        if context.bytes > self.max_bytes:
            return
        self._contexts[key] = context
        self.bytes += context.bytes
        while self.bytes > self.max_bytes:
            _, oldest = self._contexts.popitem(last=False)
            self.bytes -= oldest.bytes
