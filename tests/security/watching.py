"""What this process opens and whom it calls, seen by Python's own audit events."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Watched:
    """Paths that were opened, addresses that were connected to or asked for, programs that were started."""

    opened: list[str] = field(default_factory=list)
    connected: list[object] = field(default_factory=list)
    started: list[object] = field(default_factory=list)


_now: list[tuple[int, Watched]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for thread, seen in _now:
        if threading.get_ident() != thread:
            continue
        if event == "open" and isinstance(arguments[0], str | bytes):
            seen.opened.append(os.fsdecode(arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
            seen.connected.append(arguments[:2])
        elif event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
            seen.started.append(arguments[0])


sys.addaudithook(_hook)  # can never be taken away again, so there is one for all


@contextmanager
def watching() -> Iterator[Watched]:
    """What this thread opens and calls meanwhile."""
    seen = Watched()
    _now.append((threading.get_ident(), seen))
    try:
        yield seen
    finally:
        _now.remove((threading.get_ident(), seen))
