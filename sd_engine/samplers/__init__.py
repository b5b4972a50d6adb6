"""Samplers as tables of numbers: `table` has the one form of all, one file for each family, `names` puts them together.

Nothing here holds state, and nothing needs torch: a sampler is a function from (schedule, steps) to numbers. All are
held to diffusers 0.42, or to the published formula where it has none, line by line in `tests/engine/test_samplers*.py`.
"""

from sd_engine.samplers.names import SAMPLERS, step_table
from sd_engine.samplers.table import SLOTS, Col, StepTable

__all__ = ["SAMPLERS", "SLOTS", "Col", "StepTable", "step_table"]
