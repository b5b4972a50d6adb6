"""The wire of the faulty S3 server: one handler that speaks S3, and the faults that can be done to its requests."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_NAMESPACE = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
#: Closing with this option sends RST instead of FIN: what a crashed peer looks like.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as the stub keeps it."""

    data: bytes
    content_type: str
    modified: datetime

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data, usedforsecurity=False).hexdigest()}"'


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the stub's memory. ``fault``: what was done to it, empty when it was answered well."""

    method: str
    key: str
    fault: str


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    act: Callable[[Handler, bytes | None], bytes | None]
    p: float
    methods: frozenset[str]


class State:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.lock = threading.RLock()
        self.arrived = threading.Condition(self.lock)
        self.objects: dict[str, StoredObject] = {}
        self.requests: list[Request] = []
        self.healed = threading.Event()
        self._fault: Fault | None = None

    def switch(
        self, name: str, act: Callable[[Handler, bytes | None], bytes | None], p: float, methods: tuple[str, ...]
    ) -> None:
        with self.lock:
            self.healed = threading.Event()
            self._fault = Fault(name, act, p, frozenset(methods or ("PUT",)))

    def heal(self) -> None:
        with self.lock:
            self._fault = None
            self.healed.set()

    def enter(self, method: str, key: str) -> Fault | None:
        """Note the request; the fault that hits it, if one does."""
        with self.lock:
            fault = self._fault
            hit = fault is not None and method in fault.methods and self.rng.random() < fault.p
            self.requests.append(Request(method, key, fault.name if fault and hit else ""))
            self.arrived.notify_all()
            return fault if hit else None


class _Done(Exception):
    """The fault has answered, or cut the connection."""


def answer(status: int, code: str) -> Callable[[Handler, bytes | None], bytes | None]:
    def act(handler: Handler, body: bytes | None) -> bytes | None:
        if body is None:
            handler.read_body()
        handler.refuse(status, code)
        raise _Done

    return act


def hang(handler: Handler, body: bytes | None) -> bytes | None:
    healed = handler.state.healed
    if body is None:
        handler.read_body()
    healed.wait()
    handler.cut()
    raise _Done


def fail_after_storing(handler: Handler, body: bytes | None) -> bytes | None:
    if handler.command == "PUT":
        handler.store(handler.read_body())
    elif handler.command == "DELETE":
        handler.state.objects.pop(handler.name, None)
    handler.refuse(500, "InternalError")
    raise _Done


def reset(handler: Handler, body: bytes | None) -> bytes | None:
    if body is None:
        handler.rfile.read(handler.body_bytes // 2)
    else:
        handler.headers_of(len(body))
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
    handler.cut()
    raise _Done


def truncate(handler: Handler, body: bytes | None) -> bytes | None:
    whole = handler.read_body() if body is None else body
    return whole[: len(whole) // 2]


def lose(handler: Handler, body: bytes | None) -> bytes | None:
    if body is None:
        handler.read_body()
    handler.reply(200)
    raise _Done


def trickle(bytes_per_s: float) -> Callable[[Handler, bytes | None], bytes | None]:
    def act(handler: Handler, body: bytes | None) -> bytes | None:
        whole = handler.read_body() if body is None else body
        time.sleep(len(whole) / bytes_per_s)
        return whole

    return act


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # The faults' tools

    @property
    def name(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    @property
    def body_bytes(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def read_body(self) -> bytes:
        return self.rfile.read(self.body_bytes)

    def store(self, data: bytes) -> StoredObject:
        stored = StoredObject(data, self.headers.get("Content-Type") or "binary/octet-stream", datetime.now(UTC))
        with self.state.lock:
            self.state.objects[self.name] = stored
        return stored

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, f"<Error><Code>{code}</Code><Message>asked for</Message></Error>".encode())

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for field, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(field, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def headers_of(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def cut(self) -> None:
        """Reset the connection. Closed by its number: the orderly way of `socketserver` would send FIN first."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.close_connection = True
        os.close(self.connection.detach())

    # S3

    def do_PUT(self) -> None:
        self._guarded(self._put)

    def do_GET(self) -> None:
        self._guarded(self._list if "list-type" in self.path else self._get)

    def do_HEAD(self) -> None:
        self._guarded(self._get)

    def do_DELETE(self) -> None:
        self._guarded(self._delete)

    def do_POST(self) -> None:
        self._guarded(self._delete_many)

    def _guarded(self, reply: Callable[[Fault | None], None]) -> None:
        fault = self.state.enter(self.command, self.name.partition("/")[2])
        try:
            reply(fault)
        except (_Done, ConnectionError):
            return

    def _put(self, fault: Fault | None) -> None:
        data = fault.act(self, None) if fault else self.read_body()
        assert data is not None
        if "/" not in self.name:
            return self.reply(200)  # a bucket: all names exist
        if self.headers.get("If-None-Match") == "*" and self.name in self.state.objects:
            return self.refuse(412, "PreconditionFailed")
        if fault is None and not self._is_what_was_sent(data):
            return self.refuse(400, "BadDigest")
        self.reply(200, headers={"ETag": self.store(data).etag})

    def _is_what_was_sent(self, data: bytes) -> bool:
        md5, sha256 = self.headers.get("Content-MD5"), self.headers.get("x-amz-checksum-sha256")
        return md5 in (None, _base64("md5", data)) and sha256 in (None, _base64("sha256", data))

    def _get(self, fault: Fault | None) -> None:
        stored = self.state.objects.get(self.name)
        if "/" not in self.name:
            return self.reply(200)
        body = b"" if stored is None else stored.data
        if fault:
            body = fault.act(self, body) or b""
        if stored is None:
            return self.refuse(404, "NoSuchKey")
        told = {"ETag": stored.etag, "Content-Type": stored.content_type}
        told["Last-Modified"] = stored.modified.strftime("%a, %d %b %Y %H:%M:%S GMT")
        self.reply(200, body, told)

    def _delete(self, fault: Fault | None) -> None:
        if fault:
            fault.act(self, b"")
        with self.state.lock:
            self.state.objects.pop(self.name, None)
        self.reply(204)

    def _delete_many(self, fault: Fault | None) -> None:
        text = self.read_body().decode()
        if fault:
            fault.act(self, b"")
        with self.state.lock:
            for key in re.findall(r"<Key>([^<]*)</Key>", text):
                self.state.objects.pop(f"{self.name.strip('/')}/{key}", None)
        self.reply(200, f"<DeleteResult {_NAMESPACE}></DeleteResult>".encode())

    def _list(self, fault: Fault | None) -> None:
        if fault:
            fault.act(self, b"")
        asked = {field: values[0] for field, values in parse_qs(urlsplit(self.path).query).items()}
        start = f"{self.name.strip('/')}/{asked.get('prefix', '')}"
        after, limit = asked.get("continuation-token", ""), int(asked.get("max-keys", 1000))
        with self.state.lock:
            found = sorted((n, o) for n, o in self.state.objects.items() if n.startswith(start) and n > after)
        page, more = found[:limit], found[limit:]
        lines = [_listed(name.partition("/")[2], stored) for name, stored in page]
        token = f"<NextContinuationToken>{escape(page[-1][0])}</NextContinuationToken>" if more else ""
        truncated = f"<IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
        self.reply(
            200, f"<ListBucketResult {_NAMESPACE}>{truncated}{token}{''.join(lines)}</ListBucketResult>".encode()
        )


def _listed(key: str, stored: StoredObject) -> str:
    modified = stored.modified.strftime("%Y-%m-%dT%H:%M:%S.000Z")
    told = f"<LastModified>{modified}</LastModified><ETag>{escape(stored.etag)}</ETag><Size>{len(stored.data)}</Size>"
    return f"<Contents><Key>{escape(key)}</Key>{told}</Contents>"


def _base64(algorithm: str, data: bytes) -> str:
    return base64.b64encode(hashlib.new(algorithm, data, usedforsecurity=False).digest()).decode()
