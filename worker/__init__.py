"""The worker: the only package that knows both the jobs and the engine.

``worker.cli`` and ``worker.supervisor`` import no torch, so that a command line answers at once; everything else is
imported once a worker really starts.
"""

import sys

#: The worker command of this installation, for a process of its own. -P: a `worker` or `jobs` that lies in the folder
#: where somebody stands must not be taken for ours.
THIS_WORKER = (sys.executable, "-P", "-m", "worker")
