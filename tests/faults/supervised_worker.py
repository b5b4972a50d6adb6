"""What `tests.faults.supervised` lets the supervisor start: `python -m tests.faults.supervised_worker ARGUMENTS`.

As in `nightshift worker`, the sign of life comes before all that takes long to import.
"""

from __future__ import annotations

import importlib
import json
import sys

from tests.faults.zygote import become, die_with_parent
from worker.lifeline import Lifeline


def main() -> int:
    """`targets.worker` with these arguments, in this process."""
    lifeline = Lifeline.from_environment()
    if lifeline is not None:
        lifeline.start()
    die_with_parent()
    given = json.loads(sys.argv[1])
    become(given["environment"], given["log"])
    code: int = importlib.import_module("tests.faults.targets").worker(**given["arguments"], lifeline=lifeline)
    return code


if __name__ == "__main__":
    sys.exit(main())
