"""The arithmetic of `benchmarks.choices`, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import choices


def test_psnr_is_of_the_mean_square() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert choices.psnr(black, black) == 99.0
    assert choices.psnr(black, grey) == pytest.approx(20 * np.log10(5))


def test_a_quick_run_counts_the_rows_that_each_choice_saves(tmp_path: Path) -> None:
    out = tmp_path / "choices.json"
    assert choices.main(["--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {name: each["rows"] for name, each in result["pictures"]["choices"].items()}
    assert set(rows) == set(choices.CHOICES) and out.with_suffix(".png").is_file()
    # Six guided steps are twelve rows: int(0.6 * 6) = 3 guided ones are nine, and one whole step of three is four.
    assert rows["guidance_stop 0.6"] == pytest.approx(12 / 9, abs=1e-3)
    assert rows["deepcache_interval 3"] == 3 and result["unet"]["gain"].keys() < rows.keys()
