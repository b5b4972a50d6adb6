"""A worker under the real supervisor."""

from __future__ import annotations

import json
import re
import sys
import threading
from types import TracebackType
from typing import Any

from tests.faults.harness import Night
from worker.supervisor import BackOff, Supervisor


class Supervised:
    """Runs the supervisor, in a thread of the test, until the end of the block.

    Its worker takes seconds to import everything, as the real one does, so rows take few of them.
    """

    def __init__(self, night: Night, *, hang_limit_s: float, **how: Any) -> None:
        command = [sys.executable, "-m", "tests.faults.supervised_worker", json.dumps(night.worker_arguments(**how))]
        self._night = night
        self._supervisor = Supervisor(
            [command], grace_s=5.0, hang_limit_s=hang_limit_s, back_off=BackOff(first_s=0.05, most_s=0.2)
        )
        self._thread = threading.Thread(target=self._supervisor.run, name="supervisor")

    def pids(self) -> list[int]:
        """Of every worker that began to listen, the dead included."""
        found = re.findall(r"worker [^ :]+:(\d+):\S+ ready:", self._night.log_text())
        return [int(pid) for pid in found]

    def __enter__(self) -> Supervised:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._supervisor.stop()
        self._thread.join()
