"""How a CPU is taken for one that computes by prepacked weights, or for one that does not, whichever it is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import torch


def a_cpu_that_prepacks() -> AbstractContextManager[object]:
    """oneDNN's operators work on any x86 CPU, if not always fast; in bfloat16 where it says so."""
    return mock.patch("sd_engine.prepacking._prepacks", side_effect=lambda dtype: dtype != torch.float16)


def a_cpu_that_does_not_prepack() -> AbstractContextManager[object]:
    """As one without AVX-512."""
    return mock.patch("sd_engine.prepacking._prepacks", return_value=False)
