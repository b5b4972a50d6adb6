"""A pytest plugin that breaks our own code for a whole run: `pytest -p tests.faults.mutating` with `VARIABLE` set.

Loaded only by `tests.faults.mutate`. The processes of the zygote are broken the same way.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import Phase, settings

#: The name of a mutation; inherited by every process that the tests start.
VARIABLE = "FAULTS_MUTATION"
#: What is broken may never happen, and nobody needs to wait a minute to see that.
PATIENCE_S = 20.0


def pytest_configure(config: pytest.Config) -> None:
    from tests.faults import harness, mutations  # after pytest has set itself up to rewrite their asserts

    mutations.apply(os.environ[VARIABLE])
    # That it fails is enough; the smallest example takes minutes.
    settings.register_profile("mutated", phases=[Phase.generate])
    settings.load_profile("mutated")
    for waits in (harness.Night.wait_until, harness.Night.wait_ended):
        waits.__defaults__ = (PATIENCE_S,)
