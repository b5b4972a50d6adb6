"""A model hub on this machine: the little of its interface that a pull asks for, and the faults of a bad network.

Large files are answered by another host (`localhost` instead of `127.0.0.1`), as the real hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS = (".safetensors", ".ckpt", ".bin")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a file's content, as it came."""

    host: str
    name: str
    start: int
    authorized: bool


@dataclass(slots=True)
class LocalHub:
    """Repositories by id, each files by name. What is in `faults` happens once a request, the first first.

    A fault is an HTTP status, or the fraction of what was asked for after which the connection is cut. `pages` are
    repositories for which a page of text is shown instead of a listing.
    """

    repositories: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    faults: dict[str, list[int | float]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    pages: set[str] = field(default_factory=set)
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def starts(self, name: str) -> list[int]:
        """At which byte each request for this file's content began."""
        return [asked.start for asked in self.asked if asked.name == name]


def _sibling(name: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    sibling: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": blob}
    if name.endswith(LFS):
        sibling["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 130}
    return sibling


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            self._list(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/(content/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send(match[2], match[4], elsewhere=bool(match[1]))
        else:
            self._refuse(404, "EntryNotFound")

    def _list(self, repository: str, revision: str) -> None:
        if repository in self.hub.pages:
            return self._answer(200, b"<html>Sign in to this network</html>", {"Content-Type": "text/html"})
        if repository not in self.hub.repositories:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = self.hub.repositories[repository]
        siblings = [_sibling(name, content) for name, content in files.items()]
        answer = json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode()
        self._answer(200, answer, {"Content-Type": "application/json"})

    def _send(self, repository: str, name: str, *, elsewhere: bool) -> None:
        if name.endswith(LFS) and not elsewhere:
            place = f"http://localhost:{self.hub.port}/content{self.path}"
            return self._answer(302, b"", {"Location": place, "X-Repo-Commit": COMMIT})
        content = self.hub.repositories[repository][name]
        if name in self.hub.damaged:
            content = bytes(content[:-1]) + bytes([content[-1] ^ 1])
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")) or 0)
        host = str(self.headers["Host"]).partition(":")[0]
        self.hub.asked.append(Asked(host, name, start, "Authorization" in self.headers))
        faults = self.hub.faults.get(name)
        fault = faults.pop(0) if faults else 1.0
        if fault > 1:
            return self._refuse(int(fault), "")
        ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._answer(206 if start else 200, content[start:], ranged, share=fault)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], share: float = 1.0) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: int(len(body) * share)])
        self.close_connection = share < 1


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A hub that runs until the end of the block."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
