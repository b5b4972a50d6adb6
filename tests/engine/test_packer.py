"""The packer's promises, on integers only: no model, no tensors, no time."""

from __future__ import annotations

from collections import Counter
from itertools import count, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_engine.errors import BrokenInvariant
from sd_engine.packer import URGENT_RUN, Packer
from sd_engine.request import Request
from sd_engine.row import Lane, Row
from sd_engine.samplers import SLOTS, Col, StepTable

LANES = (Lane("mini", 64, 64), Lane("mini", 64, 128), Lane("other", 64, 64), Lane("mini", 128, 128))
CELLS = 64  # units of an unguided row of the first lane: 8 x 8 latent pixels
_ids = count(1)


def new_row(lane: Lane = LANES[0], *, guided: bool = False, steps: int = 3, urgent: bool = False) -> Row:
    table = StepTable(np.zeros((steps, len(Col))), np.zeros((steps, SLOTS, SLOTS + 1)), 1.0, 1.0, 1.0)
    return Row(next(_ids), Request("x", guidance=7.5 if guided else None), lane, table, urgent=urgent)


def step(packer: Packer) -> tuple[list[Row], list[Row]]:
    """One engine step: (packed, retired)."""
    packer.admit()
    packer.check()
    packed = packer.pack()
    packer.check()
    for row in packed:
        row.step += 1
    retired = packer.retire()
    packer.check()
    return packed, retired


def assert_within_limits(packer: Packer, packed: list[Row]) -> None:
    assert len({(row.lane, row.urgent) for row in packed}) <= 1
    assert len(set(map(id, packed))) == len(packed)
    assert not any(row.cancelled or row.error for row in packed)
    if len(packed) > 1:
        assert sum(row.units for row in packed) <= packer.max_units
        assert len(packed) <= packer.max_rows


rows = st.builds(new_row, st.sampled_from(LANES), guided=st.booleans(), steps=st.integers(1, 6))
some_urgent = st.builds(
    new_row, st.sampled_from(LANES), guided=st.booleans(), steps=st.integers(1, 6), urgent=st.booleans()
)
events = st.one_of(
    st.tuples(st.just("add"), some_urgent),
    st.tuples(st.just("step"), st.none()),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("fail"), st.integers(0, 30)),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(events, max_size=60), st.integers(1, 12 * CELLS), st.integers(1, 5))
def test_each_row_retires_exactly_once_whatever_happens(
    events: list[tuple[str, Row | int | None]], max_units: int, max_rows: int
) -> None:
    packer = Packer(max_units, max_rows)
    added: list[Row] = []
    retired: Counter[int] = Counter()
    for event, subject in events:
        if isinstance(subject, Row):
            packer.add(subject)
            added.append(subject)
        elif event == "cancel" and isinstance(subject, int) and added:
            row = added[-1 - subject % len(added)]
            assert packer.cancel(row.id) == (row.id not in retired)
        elif event == "fail" and isinstance(subject, int) and added:
            row = added[-1 - subject % len(added)]
            if row.step > 0 and row.id not in retired:
                row.error = ArithmeticError("NaN")  # as the runner does to a row that it has stepped
        else:
            packed, gone = step(packer)
            assert_within_limits(packer, packed)
            retired.update(row.id for row in gone)
        packer.check()
        assert len(packer) == len(added) - retired.total()
    left = sum(len(row.table) - row.step for row in added if row.id not in retired and not row.leaving)
    for _ in range(left + 1):  # every pack moves at least one row, so the work left bounds the packs needed
        retired.update(row.id for row in step(packer)[1])
    assert packer.idle
    assert retired == Counter(row.id for row in added)
    for row in added:
        assert row.done or row.cancelled or row.error is not None
        assert row.step <= len(row.table)


@settings(deadline=None)
@given(st.lists(rows, min_size=1, max_size=20), st.integers(1, 12 * CELLS), st.integers(1, 5))
def test_no_admitted_row_waits_longer_than_one_round_of_the_lanes(
    added: list[Row], max_units: int, max_rows: int
) -> None:
    """Rows keep arriving in every lane, and still an admitted row steps once in as many packs as there are lanes."""
    packer = Packer(max_units, max_rows)
    for row in added:
        packer.add(row)
    waited: Counter[int] = Counter()
    for turn in range(30):
        packer.add(new_row(LANES[turn % len(LANES)], steps=1 + turn % 3))
        for row in packer.admit():
            waited[row.id] = 0
        packed = packer.pack()
        for row in packed:
            row.step += 1
            waited[row.id] = -1
        for row in packer.retire():
            del waited[row.id]
        for row_id in waited:
            waited[row_id] += 1
        assert all(turns < len(LANES) for turns in waited.values())


@settings(deadline=None)
@given(st.lists(some_urgent, min_size=1, max_size=20), st.integers(1, 12 * CELLS), st.integers(1, 5))
def test_rows_of_a_lane_are_admitted_in_the_order_they_came(added: list[Row], max_units: int, max_rows: int) -> None:
    packer = Packer(max_units, max_rows)
    for row in added:
        packer.add(row)
    admitted: list[Row] = []
    while not packer.idle:
        admitted += packer.admit()
        for row in packer.pack():
            row.step += 1
        packer.retire()
    for lane, urgent in product(LANES, (False, True)):
        came, went = (
            [row.id for row in all_rows if (row.lane, row.urgent) == (lane, urgent)] for all_rows in (added, admitted)
        )
        assert went == came


@settings(deadline=None)
@given(
    st.lists(rows, min_size=1, max_size=20),
    st.lists(st.sampled_from(LANES), min_size=1, max_size=4),
    st.integers(1, 12 * CELLS),
    st.integers(1, 6),
)
def test_an_endless_stream_of_urgent_rows_starves_nobody(
    added: list[Row], urgent_lanes: list[Lane], max_units: int, urgent_run: int
) -> None:
    """Somebody always waits for a picture, in one lane or several, and still every other row ends, within a bound."""
    packer = Packer(max_units, max_rows=3, urgent_run=urgent_run)
    for row in added:
        packer.add(row)
    packs_without = 0
    left = sum(len(row.table) for row in added)
    for turn in range(left * (urgent_run + 1)):
        packer.add(new_row(urgent_lanes[turn % len(urgent_lanes)], steps=1, urgent=True))
        packer.add(new_row(urgent_lanes[turn % len(urgent_lanes)], steps=1, urgent=True))
        packed, _ = step(packer)
        packs_without = packs_without + 1 if packed[0].urgent else 0
        if all(row.done for row in added):
            return
        assert packs_without <= urgent_run
    raise AssertionError("every run of urgent packs is followed by one that moves another row")


@settings(deadline=None)
@given(st.lists(rows, max_size=20), st.integers(0, 10), st.sampled_from(LANES), st.integers(1, 12 * CELLS))
def test_an_urgent_row_moves_with_every_pack_from_its_arrival_on(
    added: list[Row], before: int, lane: Lane, max_units: int
) -> None:
    """However many rows wait, and whatever is admitted; it shares its packs with nobody, so its steps are short."""
    packer = Packer(max_units, max_rows=5)
    for row in added:
        packer.add(row)
    for _ in range(before):
        step(packer)
    urgent = new_row(lane, guided=True, steps=URGENT_RUN, urgent=True)
    packer.add(urgent)
    for _ in range(URGENT_RUN - 1):
        assert step(packer)[0] == [urgent]
    assert step(packer) == ([urgent], [urgent])


def test_the_others_neither_step_nor_are_prepared_while_somebody_waits_for_a_picture() -> None:
    packer = Packer(max_units=2 * CELLS)
    first, second, third = new_row(steps=2), new_row(steps=2), new_row(LANES[2], steps=1)
    packer.add(first)
    assert step(packer)[0] == [first]
    packer.add(second)
    packer.add(third)
    urgent = new_row(steps=2, urgent=True)
    packer.add(urgent)
    assert packer.admit() == [urgent]
    assert step(packer) == ([urgent], [])
    assert step(packer) == ([urgent], [urgent])
    assert (first.step, second.step, third.step) == (1, 0, 0)
    assert step(packer) == ([first, second], [first])


def test_urgent_rows_of_several_lanes_take_turns_with_each_other() -> None:
    packer = Packer(max_units=4 * CELLS)
    packer.add(new_row(steps=9))
    urgent = [new_row(lane, steps=3, urgent=True) for lane in (*LANES[:2], LANES[0])]
    for row in urgent:
        packer.add(row)
    assert [step(packer)[0] for _ in range(3)] == [[urgent[0], urgent[2]], [urgent[1]], [urgent[0], urgent[2]]]


def test_urgent_rows_that_had_no_company_leave_their_run_unspent() -> None:
    """The others wait for a whole run only where one began after they had come."""
    packer = Packer(max_units=4 * CELLS)
    packer.add(new_row(steps=3 * URGENT_RUN, urgent=True))
    for _ in range(2 * URGENT_RUN):
        step(packer)
    other = new_row(steps=1)
    packer.add(other)
    assert [other in step(packer)[0] for _ in range(URGENT_RUN + 1)] == [False] * URGENT_RUN + [True]


def test_rows_join_and_leave_at_every_step() -> None:
    packer = Packer(max_units=2 * CELLS)
    short, long, late = new_row(steps=1), new_row(steps=3), new_row(steps=1)
    packer.add(short)
    packer.add(long)
    packer.add(late)
    assert step(packer) == ([short, long], [short])
    assert step(packer) == ([long, late], [late])
    assert step(packer) == ([long], [long])
    assert packer.idle


def test_a_row_larger_than_the_limit_goes_alone() -> None:
    packer = Packer(max_units=CELLS)
    big, small = new_row(guided=True, steps=2), new_row(steps=1)
    packer.add(big)
    packer.add(small)
    assert step(packer) == ([big], [])
    assert step(packer) == ([big], [big])
    assert step(packer) == ([small], [small])


def test_lanes_take_turns() -> None:
    packer = Packer(max_units=100 * CELLS)
    for lane in LANES[:3]:
        packer.add(new_row(lane, steps=4))
    assert [step(packer)[0][0].lane for _ in range(6)] == [*LANES[:3], *LANES[:3]]


def test_admitted_rows_step_in_rotation_when_a_limit_was_lowered() -> None:
    """The way out of too little memory: admitted rows stay admitted, smaller packs take them in turns."""
    packer = Packer(max_units=4 * CELLS)
    added = [new_row(steps=4) for _ in range(4)]
    for row in added:
        packer.add(row)
    assert step(packer)[0] == added
    packer.max_units = 2 * CELLS
    assert [step(packer)[0] for _ in range(3)] == [added[:2], added[2:], added[:2]]


def test_cancel_takes_a_waiting_row_out_before_it_is_admitted() -> None:
    packer = Packer(max_units=CELLS)
    first, waiting = new_row(), new_row()
    packer.add(first)
    packer.add(waiting)
    packer.admit()
    assert packer.cancel(waiting.id)
    assert packer.cancel(waiting.id), "still held, so cancelling twice is no error"
    assert packer.retire() == [waiting]
    assert not packer.cancel(waiting.id)
    assert packer.pack() == [first]


def test_a_row_cancelled_between_pack_and_retire_leaves_at_once() -> None:
    packer = Packer(max_units=CELLS)
    row = new_row(steps=9)
    packer.add(row)
    packer.admit()
    packer.pack()
    packer.cancel(row.id)
    assert packer.pack() == []
    assert packer.retire() == [row]
    assert packer.idle


def test_a_cancelled_row_is_not_stepped_beside_its_neighbours() -> None:
    packer = Packer(max_units=3 * CELLS)
    added = [new_row(), new_row(), new_row()]
    for row in added:
        packer.add(row)
    packer.admit()
    packer.cancel(added[1].id)
    added[2].error = ArithmeticError("NaN")
    assert step(packer) == ([added[0]], [added[1], added[2]])


def test_an_id_is_held_once() -> None:
    packer = Packer(max_units=CELLS)
    row = new_row()
    packer.add(row)
    with pytest.raises(ValueError, match="needs an id of its own"):
        packer.add(row)


def test_an_idle_packer_packs_nothing() -> None:
    packer = Packer(max_units=CELLS)
    assert (packer.admit(), packer.pack(), packer.retire(), len(packer), packer.idle) == ([], [], [], 0, True)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="max_units=0"):
        Packer(0)


def test_check_finds_a_row_that_was_moved_behind_the_packers_back() -> None:
    packer = Packer(max_units=CELLS)
    row = new_row()
    packer.add(row)
    row.lane = LANES[1]
    with pytest.raises(BrokenInvariant, match="in another lane"):
        packer.check()
