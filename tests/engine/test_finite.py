"""Numbers that are not finite are found wherever they lie in a file, beside everything else that loading does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sd_engine.errors import WeightsError
from sd_engine.finite import _joined, _runs, holds, looked_at
from sd_engine.layouts import opened

HALF = torch.float16


def written(path: Path, bad: str = "", value: float = float("nan")) -> Path:
    tensors = {f"layer.{i}.weight": torch.full((3, i + 1), float(i), dtype=HALF) for i in range(5)}
    tensors["between"] = torch.ones(7, dtype=torch.float32)
    if bad:
        tensors[bad][..., -1] = value
    save_file(tensors, path)
    return path


def look(path: Path, dtype: torch.dtype) -> None:
    with opened(path) as file, looked_at([(file, file.keys)], dtype):
        pass


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bad", ["layer.0.weight", "layer.3.weight", "layer.4.weight"])
def test_the_tensor_with_a_number_that_is_not_finite_is_named(tmp_path: Path, bad: str, value: float) -> None:
    path = written(tmp_path / "model.safetensors", bad, value)
    with pytest.raises(WeightsError, match=rf"model\.safetensors: {bad} has numbers that are not finite .*damaged"):
        look(path, HALF)
    look(path, torch.float32)  # what will be converted is looked at on its way


def test_what_is_sound_passes(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors")
    look(path, HALF)
    look(path, torch.float32)


def test_an_error_of_the_block_is_told_and_not_what_was_found_beside_it(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", "layer.1.weight")
    with pytest.raises(KeyError), opened(path) as file, looked_at([(file, file.keys)], HALF):
        raise KeyError("another")


def test_the_tensors_of_a_file_are_one_run_but_for_those_of_another_dtype(tmp_path: Path) -> None:
    with opened(written(tmp_path / "model.safetensors")) as file:
        tensors = {key: file.tensor(key) for key in file.keys if file.dtype(key) == HALF}
        (run,) = _runs(tensors)
        joined = _joined([tensors[key] for key in run])
        assert torch.equal(joined, torch.cat([tensors[key].flatten() for key in run]))
        assert joined.data_ptr() == tensors[run[0]].data_ptr()
    assert _runs({}) == []


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=12))
def test_runs_hold_every_key_once_and_no_gap(pieces: list[tuple[int, bool]]) -> None:
    memory, tensors, at = torch.zeros(100, dtype=HALF), {}, 0
    for number, (length, gap) in enumerate(pieces):
        at += gap
        tensors[str(number)] = memory[at : at + length]
        at += length
    runs = _runs(tensors)
    assert [key for run in runs for key in run] == list(tensors)
    assert len(runs) == sum(gap for _, gap in pieces[1:]) + bool(pieces)
    for run in runs:
        assert len(_joined([tensors[key] for key in run])) == sum(len(tensors[key]) for key in run)


def test_views_of_a_pickle_are_looked_at_one_by_one() -> None:
    """A view's size is not how far it reaches: what lies behind it may be nobody's memory."""
    memory = torch.zeros(4, 4)
    wide, rows = memory[:, :1].expand(4, 1000), memory.T
    assert sorted(map(len, _runs({"wide": wide, "rows": rows, "none": memory[:0]}))) == [1, 1]


def test_what_holds_all_numbers_of_what() -> None:
    assert holds(torch.float32, HALF) and holds(torch.bfloat16, HALF) and holds(torch.float32, torch.bfloat16)
    assert not holds(HALF, torch.bfloat16) and not holds(HALF, torch.float32)
    assert holds(HALF, torch.float8_e5m2)
