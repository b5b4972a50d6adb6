"""How a CPU is taken for one that computes in half precision by itself, or for one that does not, whichever it is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import torch


def cpu_with_units() -> AbstractContextManager[object]:
    """Models that are loaded within compute in the dtype that they are asked for, as on a GPU: slowly, and truly so."""
    return mock.patch("sd_engine.devices.computes", return_value=True)


def cpu_without_units() -> AbstractContextManager[object]:
    """Models that are loaded within compute in float32, whatever their weights rest in."""
    return mock.patch("sd_engine.devices.computes", side_effect=lambda dtype: dtype == torch.float32)
