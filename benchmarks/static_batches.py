"""The baselines of the night: the same engine and modules, with batches that are made once instead of packs.

A batch is made when the device is free, of rows that wait then, and nobody joins it. So what differs from the packer is
the batching and nothing else. Unguided rows take one U-Net row here too: more than most batched pipelines give.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from benchmarks.nights import MeteredPacker
from sd_engine.packer import DEFAULT_MAX_ROWS
from sd_engine.row import Row
from sd_engine.samplers import SLOTS, Col, StepTable


def anything(row: Row) -> Hashable:
    """All rows of a lane may share a batch."""
    return None


def equal(row: Row) -> Hashable:
    """Jobs that one call of a batched pipeline draws: guidance may differ, whether there is any may not."""
    request = row.request
    return request.sampler, len(row.table), request.steps, request.guided, request.init_image is None


class StaticPacker(MeteredPacker):
    """Batches of rows that wait together, of one lane and `alike`, stepped until the last of them has ended.

    padded: a row that has ended stays in its batch's calls, unchanged, until the slowest has ended, as in a tensor of
    a fixed size; its picture comes with the batch's end. Else it leaves and the batch shrinks.
    Of several batches that could be made, a full one goes first, then the fullest; the oldest among equals.
    """

    def __init__(
        self, max_units: int, alike: Callable[[Row], Hashable], *, padded: bool, max_rows: int = DEFAULT_MAX_ROWS
    ) -> None:
        super().__init__(max_units, max_rows=max_rows)
        self._alike, self._padded = alike, padded
        self._steps: dict[int, int] = {}  # of the padded rows, by id, without the padding

    def draws(self, row: Row) -> bool:
        """As `MeteredPacker.draws`."""
        return row.step < self._steps.get(row.id, len(row.table))

    def admit(self) -> list[Row]:
        """As `Packer.admit`: a whole batch, when the one before has ended."""
        if any(queues.admitted for queues in self._lanes.values()):
            return []
        batch = self._next_batch()
        for row in batch:
            queues = self._lanes[row.lane, row.urgent]
            queues.waiting.remove(row)
            queues.admitted.append(row)
        if self._padded and batch:
            longest = max(len(row.table) for row in batch)
            for row in batch:
                self._steps[row.id] = len(row.table)
                row.table = idling(row.table, longest)
        return batch

    def _next_batch(self) -> list[Row]:
        groups: dict[Hashable, list[Row]] = {}
        for place, queues in self._lanes.items():
            for row in queues.waiting:
                groups.setdefault((place, self._alike(row)), []).append(row)
        batches = [(self._first_that_fit(rows), rows) for rows in groups.values()]
        if not batches:
            return []

        def order(found: tuple[list[Row], list[Row]]) -> tuple[bool, bool, int, int]:
            batch, rows = found
            full = len(batch) < len(rows)
            return not batch[0].urgent, not full, 0 if full else -len(batch), batch[0].id

        return min(batches, key=order)[0]

    def _first_that_fit(self, rows: Sequence[Row]) -> list[Row]:
        batch: list[Row] = []
        units = 0
        for row in rows:
            if not self._fits(units, len(batch), row.most_units, row.lane):
                break
            batch.append(row)
            units += row.most_units
        return batch


def idling(table: StepTable, steps: int) -> StepTable:
    """The table, and after its end lines that leave the state as it is, until it has so many."""
    more = steps - len(table)
    lines = np.repeat(table.lines[-1:], more, axis=0)
    lines[:, [Col.s, Col.draws]] = 0.0
    keep = np.zeros((SLOTS, SLOTS + 1))
    keep[0, 0] = 1.0
    keep[range(1, SLOTS), range(2, SLOTS + 1)] = 1.0  # the inputs are x, D, and the other slots
    return StepTable(
        np.concatenate([table.lines, lines]),
        np.concatenate([table.mix, np.repeat(keep[None], more, axis=0)]),
        table.init_noise_scale,
        table.init_image_scale,
        table.add_noise_scale,
    )


WAYS: Mapping[str, Callable[[int], MeteredPacker]] = MappingProxyType(
    {
        "ours, packed": MeteredPacker,
        "(a) one by one": lambda units: StaticPacker(units, anything, padded=False, max_rows=1),
        "(b) static, equal jobs": lambda units: StaticPacker(units, equal, padded=True),
        "(c) static, waits for the slowest": lambda units: StaticPacker(units, anything, padded=True),
        "(c) but rows that ended leave": lambda units: StaticPacker(units, anything, padded=False),
    }
)
"""The units of the limit -> what packs or batches a night."""
