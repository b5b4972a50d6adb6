"""Workers and producers in 50 ms: a process of one thread imports everything once and forks each of them.

Twenty seeds of fifty faults are thousands of processes, and the imports alone would take an hour. What is forked is a
process like any other: its own group, environment, log and random numbers; it dies with the zygote, and that with us.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from select import poll
from typing import Any

import boto3
from botocore.loaders import JSONFileLoader

ROOT = Path(__file__).parents[2]
#: Imported before the first fork. None of them may start a thread: a fork takes only its own along.
PRELOADED = (
    "torch", "numpy", "PIL.Image", "PIL.PngImagePlugin", "PIL.BmpImagePlugin", "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin", "PIL.PpmImagePlugin", "safetensors.torch", "celery", "kombu.transport.redis",
    "kombu.transport.memory", "kombu.pidbox", "celery.concurrency.thread", "celery.worker.consumer",
    "celery.worker.consumer.delayed_delivery", "celery.worker.components", "celery.worker.strategy",
    "celery.worker.autoscale", "celery.app.amqp", "celery.app.control", "celery.events.receiver",
    "celery.backends.base", "celery.loaders.app", "celery.fixups.django", "encodings.idna",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "sqlalchemy.dialects.postgresql.psycopg", "psycopg", "psycopg_binary.pq", "alembic.command", "boto3",
    "botocore.httpsession", "jobs.client", "jobs.storage_s3", "worker.process", "worker.logs", "tests.faults.targets",
)  # fmt: skip
_PR_SET_PDEATHSIG = 1
_SETTINGS = ("NIGHTSHIFT_", "AWS_")


@dataclass(slots=True)
class Forked:
    """A process that the zygote forked. Its exit status waits for us however late we ask, so `pid` stays its own."""

    pid: int
    zygote: Zygote
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        if self.code is None and self._ended(0.0):
            self.code = self.zygote.ask({"reap": self.pid})["code"]
        return self.code

    def wait(self, timeout: float = 60.0) -> int:
        """As `poll`, when it has ended. Raises TimeoutError."""
        if self.code is None and not self._ended(timeout):
            raise TimeoutError(f"process {self.pid} still runs after {timeout:.1f} s")
        code = self.poll()
        assert code is not None, "a process that has ended has a code"
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send the signal; harmless when the process has ended."""
        if self.code is None:
            os.kill(self.pid, number)

    def _ended(self, timeout: float) -> bool:
        descriptor = os.pidfd_open(self.pid)
        try:
            ended = poll()
            ended.register(descriptor)
            return bool(ended.poll(1000 * timeout))
        finally:
            os.close(descriptor)


class Zygote:
    """The test's end. Safe to share between threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rw", encoding="utf-8")
        self._lock = threading.Lock()

    def ask(self, question: Mapping[str, object]) -> dict[str, Any]:
        """One question, one answer."""
        with self._lock:
            print(json.dumps(question), file=self._file, flush=True)
            answer = self._file.readline()
        if not answer:
            raise RuntimeError("the zygote ended")
        told: dict[str, Any] = json.loads(answer)
        return told

    def fork(self, target: str, environment: Mapping[str, str], log: Path, **arguments: object) -> Forked:
        """A process that runs `tests.faults.targets.<target>(**arguments)` and ends with the code it returns.

        environment: its NIGHTSHIFT_... and AWS_... variables, and whatever else is to differ from ours.
        """
        question = {"target": target, "environment": dict(environment), "log": str(log), "arguments": arguments}
        return Forked(self.ask(question)["pid"], self)


@contextmanager
def running() -> Iterator[Zygote]:
    """The zygote of this process, until the end of the block."""
    ours, its = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.zygote", str(its.fileno())],
        pass_fds=[its.fileno()],
        cwd=ROOT,
        env=environment | one_thread,
        stdin=subprocess.DEVNULL,
        preexec_fn=die_with_parent,
    )
    its.close()
    try:
        with ours:
            zygote = Zygote(ours)
            threads = zygote.ask({"ready": True})["threads"]
            assert threads == 1, f"an import started threads ({threads} run): their locks would be forked in any state"
            yield zygote
    finally:
        process.kill()
        process.wait()


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@functools.cache
def read_once() -> None:
    """Parse what describes S3 to boto3, once for this process: a client takes longer for it than for all else."""
    read = functools.cache(JSONFileLoader().load_file)
    setattr(JSONFileLoader, "load_file", lambda self, path: read(path))  # noqa: B010, mypy refuses a plain assignment
    nobody = {"aws_access_key_id": "-", "aws_secret_access_key": "-", "region_name": "us-east-1"}
    boto3.session.Session(**nobody).client("s3").close()


# In the zygote


def main() -> None:
    """Answer questions on the socket until its other end closes."""
    for name in PRELOADED:
        importlib.import_module(name)
    read_once()
    # What is there now is never garbage: no child shall look at it, and have its pages copied for that.
    gc.collect()
    gc.freeze()
    connection = socket.socket(fileno=int(sys.argv[1]))
    file = connection.makefile("rw", encoding="utf-8")
    for line in file:
        question = json.loads(line)
        if "target" in question:
            pid = _fork(question, connection)
            if not pid:
                return
            answer: dict[str, object] = {"pid": pid}
        elif "reap" in question:
            answer = {"code": _reap(question["reap"])}
        else:
            answer = {"threads": len(os.listdir("/proc/self/task"))}
        print(json.dumps(answer), file=file, flush=True)


def _reap(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _fork(question: Mapping[str, Any], connection: socket.socket) -> int:
    """The child's id; in the child this never returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent()
        connection.close()
        become(question["environment"], question["log"])
        targets = importlib.import_module("tests.faults.targets")
        code = getattr(targets, question["target"])(**question["arguments"])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `nightshift worker` ends


def become(environment: Mapping[str, str], log: str) -> None:
    """A process of its own: output, settings, failpoints, random numbers."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]
    os.environ.update(environment)
    failpoints = importlib.import_module("jobs.failpoints")
    # They were read from the environment of the zygote when it imported this.
    vars(failpoints)["_plans"] = failpoints.parse(os.environ.get(failpoints.VARIABLE, ""))
    if broken := os.environ.get("FAULTS_MUTATION"):  # see `tests.faults.mutating`
        importlib.import_module("tests.faults.mutations").apply(broken)
    random.seed()


if __name__ == "__main__":
    main()
