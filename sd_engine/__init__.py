"""Stable Diffusion in PyTorch, made for batches: rows persist, packs are made anew at every step.

The names below load torch only when they are asked for: requests, schedules, samplers and the packer work without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sd_engine.errors import BrokenInvariant, Cancelled, InvalidRequest, NonFinite, SavedRowUnusable, WeightsError
from sd_engine.request import Finished, Request
from sd_engine.samplers import SAMPLERS

if TYPE_CHECKING:
    from sd_engine.engine import Engine
    from sd_engine.model import Model, shipped_model
    from sd_engine.weights import load_model

_NEEDS_TORCH = {
    "Engine": "sd_engine.engine",
    "Model": "sd_engine.model",
    "load_model": "sd_engine.weights",
    "shipped_model": "sd_engine.model",
}

__all__ = [
    "SAMPLERS",
    "BrokenInvariant",
    "Cancelled",
    "Engine",
    "Finished",
    "InvalidRequest",
    "Model",
    "NonFinite",
    "Request",
    "SavedRowUnusable",
    "WeightsError",
    "load_model",
    "shipped_model",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(importlib.import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
