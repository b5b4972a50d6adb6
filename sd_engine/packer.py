"""Which rows are stepped together: host bookkeeping without torch.

A row waits, is admitted, is packed again and again, and leaves. Rows of a lane share packs; packs are made anew for
every step, so rows join and leave at each one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from sd_engine.errors import BrokenInvariant
from sd_engine.row import Lane, Row

DEFAULT_MAX_ROWS: Final = 64

# Packs of urgent rows in a run, while others are kept waiting. More than the steps of a usual picture: one job that
# somebody waits for is not disturbed; and an endless stream of them leaves the others about every fortieth pack, which
# is a full one.
URGENT_RUN: Final = 40


@dataclass(slots=True, eq=False)
class _Queues:
    """The urgent rows of one lane, or the others. The first of `waiting` came first, of `admitted` steps first."""

    turn: int  # when these were packed last, or first seen: the smallest goes next
    waiting: deque[Row] = field(default_factory=deque)
    admitted: deque[Row] = field(default_factory=deque)
    dropped: list[Row] = field(default_factory=list)  # cancelled while waiting; they leave with the next retire

    def rows(self) -> list[Row]:
        return [*self.waiting, *self.admitted, *self.dropped]

    @property
    def ready(self) -> bool:
        """Whether an admitted row can step."""
        return any(not row.leaving for row in self.admitted)


class Packer:
    """Rows in lanes, admitted in the order they came, packed in turns.

    max_units (U-Net rows x latent area) and max_rows (images) limit two things: one pack, for the memory that a step
    takes, and what each lane has admitted, so that a lane's admitted rows normally all step together and none is
    prepared long before it can move. A single row above max_units is admitted and packed alone: it would otherwise
    never be drawn. So a pack is within both limits, or is one row. A lane whose pack did not fit the device's memory
    gets a limit of its own (`too_large`), for good.

    Fair: the lane that was packed longest ago goes next; within it rows step in rotation. With L lanes holding
    admitted rows, each lane steps at least once in L packs. Waiting rows are never overtaken within their lane.
    Only rows whose steps are of one call (`Row.call`) share a pack; the others are first at their lane's next turn. So
    where admitted rows of a lane need C different calls, each of them steps at least once in C turns of the lane.

    Urgent rows (`Row.urgent`) have queues and limits of their own, so they are admitted at once, and packs of their
    own, so their steps cost no more than on an idle machine. They go first: the others neither step nor are admitted
    meanwhile, but keep what they have. Fair all the same: urgent rows make at most `urgent_run` packs in a run while
    others are held, so with L lanes of others each of these steps at least once in L x (urgent_run + 1) packs.

    max_unet_rows: the U-Net rows that packs are padded to (`Engine(deterministic=True)`); None: they are not.
    """

    def __init__(
        self,
        max_units: int,
        max_rows: int = DEFAULT_MAX_ROWS,
        *,
        max_unet_rows: int | None = None,
        urgent_run: int = URGENT_RUN,
    ) -> None:
        if max_units < 1 or max_rows < 1:
            raise ValueError(f"max_units={max_units}, max_rows={max_rows}: each must be at least 1")
        self.max_units = max_units
        self.max_rows = max_rows
        self.max_unet_rows = max_unet_rows
        self.urgent_run = urgent_run
        self._lanes: dict[tuple[Lane, bool], _Queues] = {}
        self._limits: dict[Lane, int] = {}
        self._rows: dict[int, Row] = {}
        self._clock = count(1)
        self._run = 0  # packs of urgent rows since the others had one, or since there are none
        self._added = 0
        self._retired = 0

    def __len__(self) -> int:
        """Rows held: waiting, admitted, or cancelled and not yet retired."""
        return len(self._rows)

    @property
    def idle(self) -> bool:
        return not self._rows

    def add(self, row: Row) -> None:
        """Take a row in; it waits behind the rows of its lane. Raises ValueError for an id that is held already."""
        if row.id in self._rows:
            raise ValueError(f"row id {row.id} is already in the packer: every row needs an id of its own")
        self._rows[row.id] = row
        self._added += 1
        if _place(row) not in self._lanes:
            self._lanes[_place(row)] = _Queues(turn=next(self._clock))
        self._lanes[_place(row)].waiting.append(row)

    def cancel(self, row_id: int) -> bool:
        """Mark a row; it makes no further step and leaves with the next retire. False: not held (any more)."""
        row = self._rows.get(row_id)
        if row is None:
            return False
        row.cancelled = True
        queues = self._lanes[_place(row)]
        if row in queues.waiting:
            queues.waiting.remove(row)
            queues.dropped.append(row)
        return True

    def limit(self, lane: Lane) -> int:
        """The most units of one pack of this lane."""
        limit = self.max_units if self.max_unet_rows is None else self.bucket(lane) * lane.cells
        return self._limits.get(lane, limit)

    def bucket(self, lane: Lane) -> int:
        """U-Net rows that each pack of this lane is padded to; 0: packs are not padded."""
        if self.max_unet_rows is None:
            return 0
        return max(2, min(self.max_unet_rows, self.max_units // lane.cells))

    def too_large(self, rows: Sequence[Row]) -> None:
        """These rows, of one lane, did not fit in memory together: half of them is the lane's limit from now on."""
        lane, units = rows[0].lane, sum(row.units for row in rows)
        self._limits[lane] = min(self.limit(lane), max(units // 2, 1))

    def admit(self) -> list[Row]:
        """Move waiting rows in while there is room for them; returns those newly admitted, to be prepared."""
        urgent, others = self._queues(urgent=True), self._queues(urgent=False)
        admitted = [row for queues in urgent for row in self._admit(queues)]
        if self._run >= self.urgent_run or not any(queues.ready for queues in urgent):
            admitted += [row for queues in others for row in self._admit(queues)]
        return admitted

    def pack(self) -> list[Row]:
        """Rows of one lane, all urgent or none, to step together within the limits; empty when no row can step."""
        ready = self._turns()
        if not ready:
            return []
        queues = min(ready, key=lambda lane: lane.turn)
        queues.turn = next(self._clock)
        packed = self._take(queues.admitted)
        # Rotation: rows that had to stay out (of another call, or once a limit was lowered) are first next time.
        stayed = [row for row in queues.admitted if row not in packed]
        queues.admitted = deque([*stayed, *packed])
        return packed

    def retire(self) -> list[Row]:
        """Remove and return the rows that are done, cancelled or failed."""
        retired: list[Row] = []
        for place, queues in list(self._lanes.items()):
            retired += queues.dropped
            retired += [row for row in queues.admitted if row.leaving]
            queues.dropped = []
            queues.admitted = deque(row for row in queues.admitted if not row.leaving)
            if not queues.admitted and not queues.waiting:
                del self._lanes[place]
        for row in retired:
            del self._rows[row.id]
        self._retired += len(retired)
        return retired

    def check(self) -> None:
        """Raise BrokenInvariant where the books contradict themselves. Linear in the rows held."""
        held = [row.id for queues in self._lanes.values() for row in queues.rows()]
        _hold(len(set(held)) == len(held), "a row is in two places", held)
        _hold(set(held) == set(self._rows), "the index and the lanes differ", set(held) ^ set(self._rows))
        _hold(self._added == self._retired + len(held), "rows were lost", (self._added, self._retired, len(held)))
        for place, queues in self._lanes.items():
            _hold(bool(queues.rows()), "an empty lane is kept", place)
            _hold(all(_place(row) == place for row in queues.rows()), "a row is in another lane", place)
            _hold(not any(row.cancelled for row in queues.waiting), "a cancelled row waits", place)

    def _queues(self, *, urgent: bool) -> list[_Queues]:
        return [queues for (_, are), queues in self._lanes.items() if are == urgent]

    def _turns(self) -> list[_Queues]:
        """Whose turn it may be: the urgent rows', unless they have had their run and others can step."""
        urgent = [queues for queues in self._queues(urgent=True) if queues.ready]
        others = self._queues(urgent=False)
        ready = [queues for queues in others if queues.ready]
        if urgent and not (ready and self._run >= self.urgent_run):
            self._run = self._run + 1 if others else 0
            return urgent
        self._run = 0
        return ready

    def _admit(self, queues: _Queues) -> list[Row]:
        admitted = []
        units = sum(row.most_units for row in queues.admitted)
        while queues.waiting:
            row = queues.waiting[0]
            if not self._fits(units, len(queues.admitted), row.most_units, row.lane):
                break
            queues.admitted.append(queues.waiting.popleft())
            units += row.most_units
            admitted.append(row)
        return admitted

    def _fits(self, units: int, rows: int, more: int, lane: Lane) -> bool:
        """Whether a row of `more` units may join `rows` rows of `units` units. A row may always be alone."""
        return rows == 0 or (units + more <= self.limit(lane) and rows < self.max_rows)

    def _take(self, admitted: deque[Row]) -> list[Row]:
        """The first row that can step, and what fits beside it, in order."""
        packed: list[Row] = []
        units = 0
        for row in admitted:
            if row.leaving or (packed and row.call != packed[0].call):
                continue
            if self._fits(units, len(packed), row.units, row.lane):
                packed.append(row)
                units += row.units
        return packed


def _place(row: Row) -> tuple[Lane, bool]:
    """Whose queues a row is in."""
    return row.lane, row.urgent


def _hold(holds: bool, what: str, where: object) -> None:
    if not holds:
        raise BrokenInvariant(f"packer: {what}: {where}")
