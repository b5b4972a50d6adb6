"""What tells requests and step tables apart: the same letters for the same picture."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np

from sd_engine.request import Request
from sd_engine.samplers import StepTable


def request_fingerprint(request: Request) -> str:
    """The same for requests that ask for the same picture of a model."""
    digest = hashlib.sha256()
    for field in fields(request):
        value = getattr(request, field.name)
        shown = f"{value.shape} {value.dtype}" if isinstance(value, np.ndarray) else repr(value)
        digest.update(f"{field.name}={shown}\n".encode())
        if isinstance(value, np.ndarray):
            digest.update(value.tobytes())
    return digest.hexdigest()


def table_fingerprint(table: StepTable) -> str:
    """Of the numbers as the device sees them: the last bits of float64 differ between processors."""
    scales = np.array([table.init_noise_scale, table.init_image_scale, table.add_noise_scale])
    digest = hashlib.sha256(f"{table.lines.shape}".encode())
    for numbers in (table.lines, table.mix, scales):
        digest.update((numbers.astype(np.float32) + np.float32(0)).tobytes())  # + 0: there is no negative zero left
    return digest.hexdigest()
