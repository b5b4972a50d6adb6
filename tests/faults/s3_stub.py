"""An S3 server that does wrong on request: what neither a real server nor moto can be asked for.

It keeps objects in memory, takes path-style requests with any signature, and runs in threads of this process on
loopback. It is no oracle of S3: the storage's contract tests run against rclone and moto.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

from tests.faults import s3_wire
from tests.faults.s3_wire import Handler, Request, State
from tests.servers import S3Server


class FaultyS3:
    """Switch a fault on with a method, off with ``heal``; one at a time. Each takes ``p``, the share of requests that
    it hits, and ``methods``, those that it hits (HTTP's names; uploads alone unless told)."""

    def __init__(self, endpoint: str, state: State) -> None:
        self.server = S3Server(endpoint)
        self._state = state

    # What it does wrong

    def slow_down(self, p: float = 1.0, *methods: str) -> None:
        """503 SlowDown; nothing is stored."""
        self._state.switch("503", s3_wire.answer(503, "SlowDown"), p, methods)

    def deny(self, code: str = "ExpiredToken", p: float = 1.0, *methods: str) -> None:
        """403 with this code; nothing is stored."""
        self._state.switch("403", s3_wire.answer(403, code), p, methods)

    def conflict(self, status: int = 409, p: float = 1.0, *methods: str) -> None:
        """409 ConditionalRequestConflict or 412 PreconditionFailed; nothing is stored."""
        code = "PreconditionFailed" if status == 412 else "ConditionalRequestConflict"
        self._state.switch(str(status), s3_wire.answer(status, code), p, methods)

    def hang(self, p: float = 1.0, *methods: str) -> None:
        """Read the request and never answer; ``heal`` closes the connection."""
        self._state.switch("hang", s3_wire.hang, p, methods)

    def fail_after_storing(self, p: float = 1.0, *methods: str) -> None:
        """Store the object, then answer 500."""
        self._state.switch("500 after storing", s3_wire.fail_after_storing, p, methods)

    def reset_mid_body(self, p: float = 1.0, *methods: str) -> None:
        """Reset the connection in the middle of the body: the request's, or the answer's of a GET."""
        self._state.switch("reset", s3_wire.reset, p, methods)

    def truncate(self, p: float = 1.0, *methods: str) -> None:
        """Store, or answer a GET with, the first half of the body, and call it a success."""
        self._state.switch("truncate", s3_wire.truncate, p, methods)

    def lose(self, p: float = 1.0, *methods: str) -> None:
        """Call it a success, and store nothing."""
        self._state.switch("lose", s3_wire.lose, p, methods)

    def trickle(self, bytes_per_s: float = 1000.0, p: float = 1.0, *methods: str) -> None:
        """Take the body at this speed, then answer well."""
        self._state.switch("trickle", s3_wire.trickle(bytes_per_s), p, methods)

    def heal(self) -> None:
        """Every request is answered well from now on, and connections that hang are closed."""
        self._state.heal()

    # What it saw

    @property
    def objects(self) -> Mapping[str, bytes]:
        """The objects of all buckets by ``bucket/key``, as they are now."""
        with self._state.lock:
            return {name: stored.data for name, stored in self._state.objects.items()}

    @property
    def requests(self) -> tuple[Request, ...]:
        """Every request so far, in the order of their arrival."""
        with self._state.lock:
            return tuple(self._state.requests)

    def seen(self, method: str = "PUT", *, fault: str | None = None) -> int:
        """How many requests of this method there were; ``fault``: of those, the ones that it was done to."""
        return sum(one.method == method and fault in (None, one.fault) for one in self.requests)

    def wait_seen(self, count: int, method: str = "PUT", *, fault: str | None = None, timeout_s: float = 60.0) -> None:
        """Return once `count` such requests have come. Raises TimeoutError."""
        with self._state.lock:
            if not self._state.arrived.wait_for(lambda: self.seen(method, fault=fault) >= count, timeout_s):
                raise TimeoutError(f"{self.seen(method, fault=fault)} of {count} {method} came within {timeout_s} s")

    def remove(self, name: str) -> None:
        """Delete the object ``bucket/key``, as somebody's hand might."""
        with self._state.lock:
            del self._state.objects[name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    #: A burst of a worker's uploads must not be refused before the fault under test is reached.
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed or gave up; the tests look at what it stored


@contextmanager
def faulty_s3(seed: int = 0) -> Iterator[FaultyS3]:
    """A healthy stub without objects; `seed` of the draws that choose which requests a fault hits."""
    state = State(random.Random(seed))
    server = _Server(("127.0.0.1", 0), type("OneHandler", (Handler,), {"state": state}))
    stub = FaultyS3(f"http://127.0.0.1:{server.server_port}", state)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="faulty-s3", daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        state.heal()
        server.shutdown()
        thread.join()
        server.server_close()
