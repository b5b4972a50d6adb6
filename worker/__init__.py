"""The worker: the only package that knows both the jobs and the engine.

``worker.cli`` and ``worker.supervisor`` import no torch, so that a command line answers at once; everything else is
imported once a worker really starts.
"""
