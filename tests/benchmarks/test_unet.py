from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, unet


def line(peer: str, seconds: float, rows: int = 1) -> dict[str, Any]:
    return {"rows": rows, "peer": peer, "seconds a row": {"median": seconds}, "difference": 0.0}


def test_a_quick_run_compares_every_peer_with_the_reference(tmp_path: Path) -> None:
    out = tmp_path / "unet.json"
    peers = ["ours", "ours, plain convolutions", "eager", "channels-last"]
    assert (
        unet.main(
            ["--quick", "--dtype", "fp32", "--rows", "1", "2", "--repeats", "1", "--out", str(out), "--peers", *peers]
        )
        == 0
    )
    lines = json.loads(out.read_text("utf-8"))["rows"]
    assert [(each["rows"], each["peer"]) for each in lines] == [(rows, peer) for rows in (1, 2) for peer in peers]
    assert all(each["difference"] < 1e-3 for each in lines)
    assert out.with_suffix(".png").stat().st_size > 0


def test_a_prediction_that_is_wrong_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "_apart", lambda ours, theirs: float("nan"))
    out = str(tmp_path / "unet.json")
    command = ["--quick", "--dtype", "fp32", "--rows", "1", "--repeats", "1", "--out", out, "--peers", "ours"]
    assert unet.main(command) == 1


def test_each_dtype_that_the_machine_multiplies_has_a_file_and_a_quick_run_replaces_no_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "computes", lambda dtype: True)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert unet.main(["--quick", "--rows", "1", "--repeats", "1", "--peers", "ours"]) == 0
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.json")) == [
        "quick/unet.json",
        "quick/unet_bf16.json",
    ]


def test_one_file_cannot_hold_the_results_of_two_dtypes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        unet.main(["--quick", "--out", "unet.json"])
    assert "--dtype" in capsys.readouterr().err


def test_the_reference_is_as_fast_as_its_fastest_way() -> None:
    lines = [line("ours", 1.0), line("eager", 2.0), line("channels-last", 1.5), line("compiled", 1.2)]
    lines += [line("ours", 1.0, 2), line("eager", 1.6, 2)]
    assert unet._ratio(lines, "ours", unet.REFERENCE) == pytest.approx((1.2 + 1.6) / 2)


def test_what_was_not_measured_has_no_ratio() -> None:
    assert unet._ratio([line("ours", 1.0)], "ours", ("openvino",)) == 0.0
