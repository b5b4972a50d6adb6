"""The script for a GPU runs from end to end where there is none, refuses what is wrong, and loses no figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu, gpu_model, gpu_packs, gpu_stages
from benchmarks.gpu_model import PaddedRunner, Setup
from benchmarks.gpu_packs import Way
from benchmarks.gpu_stages import Figure
from sd_engine.model import SD1

MATH = SDPBackend.MATH


@pytest.fixture(scope="module")
def setup() -> Setup:
    return gpu_model.quick(torch.device("cpu"), torch.float32)


def test_a_machine_without_cuda_is_told_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_row_of_sd_costs_what_is_published() -> None:
    setup = gpu_model.full(torch.device("cpu"), torch.float32)
    assert setup.configs is SD1
    assert gpu_model.row_flops(setup) / 1e12 == pytest.approx(0.803, abs=0.001)


def test_a_compiled_unet_predicts_what_it_did(setup: Setup) -> None:
    model = gpu_model.random_model(setup, torch.float32)
    with torch.inference_mode():
        plain = gpu_model.predicted(setup, model.unet)
        gpu_model.compile_unet(setup, model.unet)
        compiled = gpu_model.predicted(setup, model.unet)
    # With AVX-512 the compiler takes other kernels than our layers: some hundred sums are rounded otherwise.
    assert gpu_model.relative(compiled, plain) < 1e-5
    assert plain.std() > 0.1, "numbers that vanish on the way would hide any mistake"


def test_stages_are_written_figure_by_figure_beside_those_of_earlier_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    for stage in ("ceilings", "attention"):
        assert gpu.main(["--quick", "--device", "cpu", "--stages", stage, "--out", str(out)]) == 0
    written = json.loads(out.read_text("utf-8"))
    assert set(written["stages"]) == {"ceilings", "attention"} and written["quick"]
    assert all(stage["figures"] and not stage["cut"] for stage in written["stages"].values())
    assert {figure["best"] for figure in written["stages"]["attention"]["figures"]} <= {"flash", "math"}


def test_no_speed_is_measured_of_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(_: Setup) -> Iterator[Figure]:
        yield {"what": "U-Net", "found": 0.3, "bar": 0.01, "right": False}

    monkeypatch.setitem(gpu.STAGES, "correct", (wrong, 60.0))
    out = tmp_path / "gpu.json"
    assert gpu.run(setup, ["correct", "ceilings"], out, {"quick": True}) == 1
    assert set(json.loads(out.read_text("utf-8"))["stages"]) == {"correct"}
    assert "wrong" in capsys.readouterr().err


def test_a_stage_that_fails_or_takes_too_long_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup
) -> None:
    def failing(_: Setup) -> Iterator[Figure]:
        yield {"what": "first"}
        raise RuntimeError("no such kernel")

    def endless(_: Setup) -> Iterator[Figure]:
        while True:
            yield {"what": "again"}

    monkeypatch.setitem(gpu.STAGES, "ceilings", (failing, 60.0))
    monkeypatch.setitem(gpu.STAGES, "attention", (endless, 0.0))
    out = tmp_path / "gpu.json"
    assert gpu.run(setup, ["ceilings", "attention"], out, {"quick": True}) == 0
    stages = json.loads(out.read_text("utf-8"))["stages"]
    assert stages["ceilings"]["failed"] == "RuntimeError: no such kernel" and stages["ceilings"]["figures"]
    assert stages["attention"]["cut"] and len(stages["attention"]["figures"]) == 1


def test_a_pack_that_fails_is_told_and_not_halved(setup: Setup) -> None:
    model = gpu_model.random_model(setup, torch.float32)
    drawing = gpu_model.engine(setup, model, 2)
    for request in gpu_model.requests(setup, 2):
        drawing.add(request)

    def refuse(*_: object) -> None:
        raise RuntimeError("called a synchronizing operation")

    model.unet.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="synchronizing"):
        drawing.step()


def test_a_way_that_fails_leaves_the_others(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu_model, "compile_unet", no_compiler)
    figures = list(gpu_packs.packs(setup, {"bad": Way(compiled={}), "good": Way(sizes=(1,))}))
    assert [figure["way"] for figure in figures if "failed" in figure] == ["bad"]
    assert [(figure["way"], figure["pictures"]) for figure in figures if "images_per_s" in figure] == [("good", 1)]


@pytest.mark.parametrize("name", gpu_packs.WAYS)
def test_every_way_predicts_what_the_plain_one_does(setup: Setup, name: str) -> None:
    way = replace(gpu_packs.WAYS[name], sizes=())
    (right,) = (figure for figure in gpu_packs.packs(setup, {name: way}) if "right" in figure)
    assert right["right"] and right["way"] == name


def test_attention_takes_the_backend_that_was_the_fastest(setup: Setup) -> None:
    best = gpu_stages.best_backends(setup)
    cells = setup.cells**2
    assert set(best) >= {(cells, cells), (cells, setup.configs.text.max_tokens)}
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    with pytest.raises(RuntimeError, match="No viable backend"):  # cuDNN needs CUDA: it alone was asked
        gpu_packs._attended_by({(16, 16): SDPBackend.CUDNN_ATTENTION}, q, k, v)
    torch.testing.assert_close(gpu_packs._attended_by({}, q, k, v), gpu_packs._attended_by({(16, 16): MATH}, q, k, v))


def test_a_pack_between_two_sizes_is_padded_to_the_next_and_draws_the_same(setup: Setup) -> None:
    model = gpu_model.random_model(setup, torch.float32)
    requests = gpu_model.leaving_one_by_one(replace(setup, steps=6), 3)
    assert [request.steps for request in requests] == [4, 5, 6]
    plain = gpu_model.engine(setup, model, 3).render(requests)
    padding = gpu_model.engine(setup, model, 3, partial(PaddedRunner, sizes=(8, 2)))
    drawn = padding.render(requests)
    assert isinstance(padding.runner, PaddedRunner)
    # Steps of three rows (four times), of two and of one: 6, 4 and 2 U-Net rows, in calls of 8, 8 and 2.
    assert (padding.runner.asked, padding.runner.padded) == (4 * 6 + 4 + 2, 5 * 8 + 2)
    assert gpu_model.psnr(drawn, plain) > 50, "only the order of sums may differ"


def test_stages_that_draw_run_whole_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--quick", "--device", "cpu", "--stages", "norm,no_wait,buckets", "--out", str(out)]) == 0
    stages = json.loads(out.read_text("utf-8"))["stages"]
    assert not [figure for stage in stages.values() for figure in stage["figures"] if "failed" in figure]
    padded = [figure for figure in stages["buckets"]["figures"] if figure["buckets"]]
    assert len(padded) == 2 and all(figure["programs"] >= 1 for figure in padded)
    assert len(stages["no_wait"]["figures"]) == 6


def test_figures_of_ways_that_are_not_asked_for_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    for ways in ("eager", "eager, channels-last", "eager"):
        common = ["--quick", "--device", "cpu", "--stages", "packs", "--sizes", "1", "--out", str(out)]
        assert gpu.main([*common, "--ways", ways]) == 0
    figures = json.loads(out.read_text("utf-8"))["stages"]["packs"]["figures"]
    speeds = [(figure["way"], figure["pictures"]) for figure in figures if "images_per_s" in figure]
    assert sorted(speeds) == [("eager", 1), ("eager, channels-last", 1)]
    with pytest.raises(SystemExit):
        gpu.main(["--ways", "fast"])
