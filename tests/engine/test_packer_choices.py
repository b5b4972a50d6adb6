"""The packer's promises for rows whose steps differ: in what they cost, and in what may share their call."""

from __future__ import annotations

from itertools import count

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_engine import reuse
from sd_engine.noise import noise_source
from sd_engine.packer import Packer
from sd_engine.request import Request
from sd_engine.row import Lane, Row
from sd_engine.samplers import SLOTS, Col, StepTable

LANES = (Lane("mini", 64, 64), Lane("mini", 64, 128))
CELLS = 64  # units of an unguided step in the first lane
_ids = count(1)


def new_row(lane: Lane = LANES[0], *, start: float = 0.0, stop: float = 1.0, steps: int = 6, interval: int = 1) -> Row:
    table = StepTable(np.zeros((steps, len(Col))), np.zeros((steps, SLOTS, SLOTS + 1)), 1.0, 1.0, 1.0)
    request = Request("x", guidance_start=start, guidance_stop=stop, deepcache_interval=interval)
    return Row(next(_ids), request, lane, table, noise=noise_source("cpu", 0), state=torch.zeros(5, 1, 1, 1))


def advance(row: Row) -> None:
    """As the runner does after a step: a whole one leaves features for those that follow."""
    (kept,) = reuse.kept([row], None if row.call.shallow else torch.zeros(row.unet_rows, 1, 1, 1))
    assert row.state is not None
    row.advance(row.state, kept)


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
            advance(row)
        packer.retire()
    # Two guided rows fill it; from their third step on each takes a half of it, and a third row comes in beside them.
    assert seen == [[0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [2, 3], [2, 3], [3], [3]]


def test_a_row_whose_guidance_begins_later_is_admitted_by_what_it_will_take() -> None:
    packer = Packer(max_units=3 * CELLS)
    late, other = new_row(start=0.5), new_row(start=0.5)
    packer.add(late)
    packer.add(other)
    assert packer.admit() == [late], "both would fit now, and not once they are guided"


mixed = st.builds(
    new_row,
    st.sampled_from(LANES),
    start=st.sampled_from([0.0, 0.5]),
    stop=st.sampled_from([0.6, 1.0]),
    steps=st.integers(1, 9),
    interval=st.sampled_from([1, 2, 3, 5]),
)


@settings(deadline=None)
@given(
    st.lists(mixed, min_size=1, max_size=20),
    st.integers(1, 12 * CELLS),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_a_pack_is_of_one_call_and_no_admitted_row_waits_longer_than_its_lane_has_calls(
    added: list[Row], max_units: int, max_rows: int, later: int
) -> None:
    """Whole and shallow steps take turns, in two packs at most, however the rows came in."""
    packer = Packer(max_units, max_rows)
    waited: dict[int, int] = {}
    for row in added[later:]:
        packer.add(row)
    for turn in range(sum(len(row.table) for row in added) + 1):
        for row in added[:later][turn : turn + 1]:
            packer.add(row)
        waited |= {row.id: 0 for row in packer.admit()}
        packed = packer.pack()
        packer.check()
        assert len({(row.lane, row.call) for row in packed}) <= 1
        if len(packed) > 1:
            assert sum(row.units for row in packed) <= max_units and len(packed) <= max_rows
        lane = packed[0].lane if packed else None
        there = {row.id for row in added if row.lane == lane and row.id in waited and not row.leaving}
        waited |= {id: waited[id] + 1 for id in there} | {row.id: 0 for row in packed}
        assert all(turns < 2 for turns in waited.values()), waited
        for row in packed:
            advance(row)
        packer.retire()
    assert packer.idle and all(row.done and row.kept is None for row in added)


def test_rows_that_come_together_reuse_together() -> None:
    packer = Packer(max_units=100 * CELLS)
    added = [new_row(interval=3, steps=6) for _ in range(4)]
    for row in added:
        packer.add(row)
    shallow = []
    while not packer.idle:
        packer.admit()
        packed = packer.pack()
        assert packed == added
        shallow.append(packed[0].call.shallow)
        for row in packed:
            advance(row)
        packer.retire()
    assert shallow == [False, True, True] * 2


def test_a_row_out_of_step_falls_in_with_those_that_reuse() -> None:
    """One turn of its own, and from then on their shallow steps are shared."""
    packer = Packer(max_units=100 * CELLS)
    first, late = new_row(interval=3, steps=7), new_row(interval=3, steps=6)
    packer.add(first)
    packs = []
    while not packer.idle:
        packer.admit()
        packed = packer.pack()
        packs.append(packed)
        for row in packed:
            advance(row)
        packer.retire()
        if len(packs) == 1:
            packer.add(late)
    assert len(packs) <= 7 + 3 and sum(len(pack) == 2 for pack in packs) >= 3, packs


def test_guidance_that_begins_between_two_whole_steps_makes_one_more() -> None:
    row = new_row(interval=3, start=0.5, steps=8)
    seen = []
    while not row.done:
        seen.append((row.call.shallow, row.unet_rows))
        advance(row)
    assert seen == [
        *[(False, 1), (True, 1), (True, 1), (False, 1)],
        *[(False, 2), (True, 2), (True, 2), (False, 2)],
    ]


def test_the_end_of_guidance_keeps_the_features_of_the_row_with_the_prompt() -> None:
    row = new_row(interval=3, stop=0.5, steps=4)
    (row.kept,) = reuse.kept([row], torch.tensor([1.0, 2.0])[:, None, None, None])
    row.step = 2
    assert row.call.shallow and row.unet_rows == 1
    features = reuse.reused([row], unet_rows=3)
    assert features is not None and features.flatten().tolist() == [2.0, 2.0, 2.0], "padded by repeating the last"
