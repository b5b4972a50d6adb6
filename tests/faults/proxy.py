"""A TCP proxy on loopback between us and a server, with faults that a test switches while bytes travel."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

HOST = "127.0.0.1"
#: Longest wait for the proxy's own thread to do what a method call asked for, in seconds.
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Way:
    """How bytes travel now. ``delay_s`` passes before each chunk of at most ``chunk_bytes``, in both directions.
    ``reply_bytes``: the server's bytes after which a connection is reset, None for never."""

    refused: bool = False
    stalled: bool = False
    delay_s: float = 0.0
    chunk_bytes: int = 65_536
    reply_bytes: int | None = None


class TcpProxy(threading.Thread):
    """Listens on ``port`` and passes connections on to ``target_port``, both on loopback.

    Each switch holds from its return on, for the connections that stand and for new ones. ``accepted`` counts the
    connections that clients ever made: it tells a test that they came back.
    """

    def __init__(self, target_port: int) -> None:
        super().__init__(name=f"proxy to {target_port}", daemon=True)
        self.accepted = 0
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._way = Way()
        self._switched = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._door = _bound(0)
        self.port = int(self._door.getsockname()[1])

    def in_front(self, url: str) -> str:
        """The URL of the server, with this proxy in its place."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}{HOST}:{self.port}"))

    @property
    def connections(self) -> int:
        """How many connections stand now."""
        return len(self._links)

    def pass_all(self) -> None:
        """No fault any more; what a stall held back travels on."""
        self._switch(Way())

    def stall(self) -> None:
        """A black hole: connections are accepted, no byte travels, nothing is closed."""
        self._switch(Way(stalled=True))

    def slow(self, delay_s: float, chunk_bytes: int = 65_536) -> None:
        """Each chunk is late."""
        self._switch(Way(delay_s=delay_s, chunk_bytes=chunk_bytes))

    def truncate(self, reply_bytes: int) -> None:
        """Each connection is reset after so many bytes of replies, counted from now or from its beginning."""
        self._switch(Way(reply_bytes=reply_bytes))

    def refuse(self) -> None:
        """Nobody listens any more, and the connections that stand are reset."""
        self._switch(Way(refused=True))
        self.cut()

    def forget(self) -> None:
        """The connections that stand fall silent for ever, as when a firewall dropped them; new ones are served."""
        self._do(self._forget())

    def cut(self) -> None:
        """Reset (RST) the connections that stand now; new ones are served as before."""
        self._do(self._cut())

    def __enter__(self) -> TcpProxy:
        self.start()
        self._switch(Way())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.join()
        self._loop.close()

    def run(self) -> None:
        self._loop.run_forever()

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(ANSWER_S)

    def _switch(self, way: Way) -> None:
        self._do(self._take(way))

    async def _take(self, way: Way) -> None:
        self._way = way
        self._switched.set()
        self._switched = asyncio.Event()
        if way.refused and self._server is not None:
            self._server.close()
            self._server = None
            self._door = _bound(self.port)  # bound but deaf: refused, and nobody else can take the port
        elif not way.refused and self._server is None:
            self._server = await asyncio.start_server(self._accept, sock=self._door)

    async def _cut(self) -> None:
        for link in list(self._links):
            link.reset()
        await asyncio.sleep(0)

    async def _forget(self) -> None:
        for link in self._links:
            link.forgotten = True

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        else:
            self._door.close()
        await self._cut()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(reader, writer)
        self._links.add(link)  # here, not in the task: one that is cancelled before its first step closes nothing
        task = self._loop.create_task(self._serve(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, link: _Link) -> None:
        requests: asyncio.Task[None] | None = None
        try:
            await self._flow()
            await link.reach(self._target_port)
            requests = self._loop.create_task(self._requests(link))
            await self._pump(link, reply=True)
        except OSError:
            link.reset()  # the server is not there, or one side was reset: the other side shall see the same
        finally:
            link.close()  # before any wait: a cancel that comes meanwhile must not leave a socket open
            self._links.discard(link)
            if requests is not None:
                requests.cancel()
                await asyncio.gather(requests, return_exceptions=True)
            await link.closed()

    async def _requests(self, link: _Link) -> None:
        try:
            await self._pump(link, reply=False)
            link.ends(reply=False)[1].write_eof()
        except OSError:
            link.reset()  # the client is gone without a word: the server must not keep its connection

    async def _flow(self) -> Way:
        """Wait while the way is stalled."""
        while self._way.stalled:
            await self._switched.wait()
        return self._way

    async def _pump(self, link: _Link, *, reply: bool) -> None:
        reader, writer = link.ends(reply)
        counted, passed = self._way, 0
        while chunk := await reader.read(self._way.chunk_bytes):
            way = await self._flow()
            if way.delay_s:
                await asyncio.sleep(way.delay_s)
                way = await self._flow()
            if link.forgotten:
                await self._loop.create_future()
            if way is not counted:
                counted, passed = way, 0
            if reply and way.reply_bytes is not None:
                chunk = chunk[: way.reply_bytes - passed]
            passed += len(chunk)
            writer.write(chunk)
            await writer.drain()
            if reply and passed == way.reply_bytes:
                raise ConnectionResetError
        await self._flow()  # an end is a packet too
        if link.forgotten:
            await self._loop.create_future()


class _Link:
    """One client's connection and, once reached, ours to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.forgotten = False
        self._sides = [(reader, writer)]
        self._dead = False

    async def reach(self, port: int) -> None:
        self._sides.append(await asyncio.open_connection(HOST, port))
        if self._dead:
            raise ConnectionResetError

    def ends(self, reply: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Where to read from and where to write to."""
        client, server = self._sides
        return (server[0], client[1]) if reply else (client[0], server[1])

    def reset(self) -> None:
        self._dead = True
        for _, writer in self._sides:
            with contextlib.suppress(OSError):
                # Lingering for 0 s makes the close a reset.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        for _, writer in self._sides:
            writer.close()

    async def closed(self) -> None:
        for _, writer in self._sides:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def _bound(port: int) -> socket.socket:
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    door.bind((HOST, port))
    return door
