"""Rows that go on elsewhere exactly where they were: what a step changes of a row, as bytes.

A row that comes back is prepared like a new one (its contexts, its mask, its condition and what they draw follow from
the request), and then gets its latent, the memory that its sampler still reads, its step and its source of noise back.
One that reuses deep features goes on from its last whole step: they are a hundred times a latent, and made again by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from sd_engine.errors import SavedRowUnusable
from sd_engine.fingerprints import request_fingerprint, table_fingerprint
from sd_engine.noise import NoiseSource, noise_source
from sd_engine.request import Request
from sd_engine.row import Row, Saved
from sd_engine.samplers import SLOTS
from sd_engine.sealed import Array, seal, unseal

if TYPE_CHECKING:
    from sd_engine.model import Model

KIND: Final = "nightshift row"

# Rises whenever the same numbers would mean something else: the slots of a state, the order of a row's draws.
VERSION: Final = 1

_FIRST, _SECOND = "first", "second"


class Saver:
    """Rows to bytes and back, for these models."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models
        self._fingerprints: dict[str, str] = {}

    def save(self, row: Row) -> bytes:
        """The row as it stands between two steps; empty where there is nothing to go on from."""
        saved = row.resume or _saved(row.standing() if row.kept is None else row.kept.at, row)
        if saved is None:
            return b""
        words = {**self._words(row), "pass": _FIRST if saved.first_pass is None else _SECOND, "step": str(saved.step)}
        tensors = {field.name: getattr(saved, field.name) for field in fields(saved) if field.name != "step"}
        arrays = {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}
        return seal(KIND, VERSION, words, arrays)

    def load(self, row: Row, data: bytes) -> Row:
        """The row, of the pass that `data` was saved in, to go on there as soon as it is prepared (`resume`).

        row: new, as `passes.first_row` makes it. Raises SavedRowUnusable for bytes that are damaged, or of another
        request, model, step table or version; then the row is as it was.
        """
        if not data:
            return row
        words, arrays = unseal(KIND, VERSION, data, limit=self._most_bytes(row))
        later = row if words.get("pass") == _FIRST else row.second
        if later is None:
            raise SavedRowUnusable("it is in a pass that its request does not have")
        for name, ours in self._words(later).items():
            if words.get(name) != ours:
                raise SavedRowUnusable(f"it was saved with another {name}")
        step = _step(words, later)
        _check(arrays, self._shapes(row, later, step))
        return self._placed(later, Saved(step, **{name: torch.from_numpy(array) for name, array in arrays.items()}))

    def _placed(self, row: Row, saved: Saved) -> Row:
        for state in (saved.noise, saved.began):
            if state is not None:
                _source(row.request, state)  # refused here, not in the midst of a step
        if saved.first_pass is not None and saved.began is not None:
            row.noise = _source(row.request, saved.began)
            row.began = saved.began
            row.first_pass = saved.first_pass.to(self._models[row.lane.model].device)
        row.step, row.resume = saved.step, saved
        return row

    def _words(self, row: Row) -> dict[str, str]:
        """What must be the same where the row goes on."""
        name = row.lane.model
        if name not in self._fingerprints:
            self._fingerprints[name] = self._models[name].fingerprint
        return {
            "request": request_fingerprint(row.request),
            "model": self._fingerprints[name],
            "table": table_fingerprint(row.table),
        }

    def _shapes(self, first: Row, later: Row, step: int) -> list[dict[str, tuple[int, ...]]]:
        """The arrays that there may be, by name, each with its shape: any of these sets."""
        noise = tuple(noise_source(later.request.noise, 0).state().shape)
        always = {"noise": noise}
        if later is not first:
            always |= {"began": noise, "first_pass": self._shape(first)}
        begun = {**always, "state": (len(later.table.live(step)), *self._shape(later))}
        sets = [begun, {**begun, "drawn": self._shape(later)}]
        return [*sets, always] if later is not first and step == 0 else sets

    def _shape(self, row: Row) -> tuple[int, int, int]:
        model = self._models[row.lane.model]
        return model.latent_channels, row.lane.height // model.factor, row.lane.width // model.factor

    def _most_bytes(self, row: Row) -> int:
        largest = int(np.prod(self._shape(row.second or row)))
        return 4 * largest * (SLOTS + 2) + 2 * noise_source(row.request.noise, 0).state().numel()


@torch.inference_mode()
def resume(row: Row) -> None:
    """Put a prepared row where it was when it was saved."""
    saved, row.resume = row.resume, None
    if saved is None or saved.state is None:
        return
    assert row.state is not None and row.noise is not None, "a row is prepared before it goes on"
    state_SCHW = torch.zeros_like(row.state)
    state_SCHW[row.table.live(saved.step)] = saved.state.to(state_SCHW)
    row.state, row.drawn, row.step = state_SCHW, saved.drawn, saved.step
    row.noise.set_state(saved.noise)


def _saved(there: Saved | None, row: Row) -> Saved | None:
    if there is None:
        return None
    state_SCHW = None if there.state is None else _copied(there.state[row.table.live(there.step)])
    return replace(there, state=state_SCHW, drawn=_copied(there.drawn), first_pass=_copied(there.first_pass))


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", copy=True).contiguous()


def _step(words: Mapping[str, str], row: Row) -> int:
    said = words.get("step", "")
    if said not in map(str, range(len(row.table))):
        raise SavedRowUnusable(f"step={said!r:.20} is none of its {len(row.table)}")
    return int(said)


def _check(arrays: Mapping[str, Array], allowed: list[dict[str, tuple[int, ...]]]) -> None:
    """Hold the arrays against the sets of shapes that there may be."""
    if {name: array.shape for name, array in arrays.items()} not in allowed:
        raise SavedRowUnusable("its arrays are not those of such a row")
    for name, array in arrays.items():
        if array.dtype != (np.uint8 if name in ("noise", "began") else np.float32):
            raise SavedRowUnusable(f"its {name} is of {array.dtype}")


def _source(request: Request, state: Tensor) -> NoiseSource:
    source = noise_source(request.noise, request.seed)
    try:
        source.set_state(state)
    except (RuntimeError, TypeError) as error:
        raise SavedRowUnusable("the state of its noise is not one") from error
    return source
