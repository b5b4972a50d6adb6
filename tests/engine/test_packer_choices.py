"""The packer's promises for rows whose steps differ: in what they cost, and in what may share their call."""

from __future__ import annotations

from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_engine.packer import Packer
from sd_engine.request import Request
from sd_engine.row import Lane, Row
from sd_engine.samplers import SLOTS, Col, StepTable

LANES = (Lane("mini", 64, 64), Lane("mini", 64, 128))
CELLS = 64  # units of an unguided step in the first lane
_ids = count(1)


def new_row(lane: Lane = LANES[0], *, start: float = 0.0, stop: float = 1.0, steps: int = 6) -> Row:
    table = StepTable(np.zeros((steps, len(Col))), np.zeros((steps, SLOTS, SLOTS + 1)), 1.0, 1.0, 1.0)
    return Row(next(_ids), Request("x", guidance_start=start, guidance_stop=stop), lane, table)


rows = st.builds(
    new_row,
    st.sampled_from(LANES),
    start=st.sampled_from([0.0, 0.2, 0.5]),
    stop=st.sampled_from([0.6, 0.8, 1.0]),
    steps=st.integers(1, 8),
)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=20), st.integers(1, 12 * CELLS), st.integers(1, 5))
def test_rows_whose_guidance_comes_and_goes_never_outgrow_a_pack_nor_wait_beside_one(
    added: list[Row], max_units: int, max_rows: int
) -> None:
    """All admitted rows of a lane step together, at each of its turns, whatever their steps cost by then."""
    packer = Packer(max_units, max_rows)
    for row in added:
        packer.add(row)
    admitted: list[Row] = []
    while not packer.idle:
        admitted += packer.admit()
        packed = packer.pack()
        if len(packed) > 1:
            assert sum(row.units for row in packed) <= max_units and len(packed) <= max_rows
        there = [row for row in admitted if row.lane == packed[0].lane and not row.leaving]
        assert sorted(row.id for row in packed) == sorted(row.id for row in there)
        for row in packed:
            row.step += 1
        packer.retire()
        packer.check()
    assert all(row.done for row in added)


def test_room_that_the_end_of_guidance_gives_back_is_used_at_once() -> None:
    packer = Packer(max_units=4 * CELLS)
    added = [new_row(stop=0.5, steps=4) for _ in range(4)]
    for row in added:
        packer.add(row)
    seen = []
    while not packer.idle:
        packer.admit()
        packed = packer.pack()
        seen.append([added.index(row) for row in packed])
        for row in packed:
            row.step += 1
        packer.retire()
    # Two guided rows fill it; from their third step on each takes a half of it, and a third row comes in beside them.
    assert seen == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [2, 3], [2, 3], [3], [3]]


def test_a_row_whose_guidance_begins_later_is_admitted_by_what_it_will_take() -> None:
    packer = Packer(max_units=3 * CELLS)
    late, other = new_row(start=0.5), new_row(start=0.5)
    packer.add(late)
    packer.add(other)
    assert packer.admit() == [late], "both would fit now, and not once they are guided"
