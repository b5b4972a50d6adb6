"""``python -m worker``: the worker command where no ``nightshift`` is on the PATH (supervisor and demo use it)."""

from jobs.redaction import guard_tracebacks
from worker.cli import worker

if __name__ == "__main__":
    guard_tracebacks()
    worker(prog_name="nightshift worker")
