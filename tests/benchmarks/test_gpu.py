"""The script for a GPU runs from end to end where there is none, refuses what is wrong, and loses no figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu, gpu_model, gpu_packs, gpu_stages
from benchmarks.gpu import Kept
from benchmarks.gpu_model import PaddedRunner, Setup
from benchmarks.gpu_packs import Way
from benchmarks.gpu_stages import Figure
from sd_engine.model import SD1


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
    plain = gpu_model.predicted(setup, model.unet, 2)
    gpu_model.compile_unet(setup, model.unet)
    compiled = gpu_model.predicted(setup, model.unet, 2)
    gpu_model.forget_compiled(model.unet)
    assert torch.equal(gpu_model.predicted(setup, model.unet, 2), plain)
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
    assert gpu.run(["correct", "ceilings"], Kept(out, {"quick": True}, setup)) == 1
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
    assert gpu.run(["ceilings", "attention"], Kept(out, {"quick": True}, setup)) == 1
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
    assert [(figure["way"], figure["what"]) for figure in figures if "failed" in figure] == [
        ("bad", "U-Net beside the plain one")
    ]
    assert [(figure["way"], figure["pictures"]) for figure in figures if "images_per_s" in figure] == [("good", 1)]


@pytest.mark.parametrize("name", gpu_packs.WAYS)
def test_every_way_predicts_what_the_plain_one_does(setup: Setup, name: str) -> None:
    way = replace(gpu_packs.WAYS[name], sizes=())
    (right,) = (figure for figure in gpu_packs.packs(setup, {name: way}) if "right" in figure)
    assert right["right"] and right["way"] == name


def test_the_other_half_precision_is_drawn_in_that_one(setup: Setup) -> None:
    half = replace(setup, dtype=torch.bfloat16)
    way = replace(gpu_packs.WAYS["eager, channels-last, other half"], sizes=(1,))
    _, right, drawn = gpu_packs.packs(half, {"other": way})
    assert right["right"] and right["dtype"] == "torch.float16"
    assert drawn["images_per_s"] > 0


def test_a_way_that_is_wrong_now_has_no_speed(tmp_path: Path, setup: Setup) -> None:
    kept = Kept(tmp_path / "gpu.json", {"quick": True, "dtype": "torch.float32"}, setup)
    kept.begin("packs")
    for way in ("eager", "compiled"):
        kept.add("packs", {"way": way, "what": "U-Net", "right": True})
        kept.add("packs", {"way": way, "pictures": 1, "dtype": "torch.float32", "images_per_s": 1.0, "tflops": 1.0})
    kept.add("packs", {"way": "compiled", "what": "U-Net", "right": False})
    figures = kept.stages["packs"]["figures"]
    assert [(figure["way"], "pictures" in figure) for figure in figures] == [
        ("eager", False),
        ("eager", True),
        ("compiled", False),
    ]
    assert kept.flawed


def test_what_was_wrong_is_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup) -> None:
    kept = Kept(tmp_path / "gpu.json", {"quick": True}, setup)
    for right in (False, True):

        def correct(_: Setup, right: bool = right) -> Iterator[Figure]:
            yield {"what": "U-Net", "right": right}

        monkeypatch.setitem(gpu.STAGES, "correct", (correct, 60.0))
        assert gpu.run(["correct"], kept) == (0 if right else 1)


def test_attention_takes_the_backend_that_was_the_fastest(setup: Setup) -> None:
    best = gpu_stages.best_backends(setup)
    cells = setup.cells**2
    width = setup.configs.unet.channels[0] // setup.configs.unet.heads[0]
    assert set(best) >= {(cells, cells, width), (cells, setup.configs.text.max_tokens, width)}
    q, k, v = torch.randn(3, 2, 4, 16, 8)
    with pytest.raises(RuntimeError, match="No viable backend"):  # cuDNN needs CUDA: it alone was asked
        gpu_packs._attended_by({(16, 16, 8): SDPBackend.CUDNN_ATTENTION}, q, k, v)
    plain = gpu_packs._attended_by({(16, 16, 8): SDPBackend.MATH}, q, k, v)
    # As many positions in a head of another width, as the VAE has: it was not measured for these.
    other = gpu_packs._attended_by({(16, 16, 4): SDPBackend.CUDNN_ATTENTION}, q, k, v)
    torch.testing.assert_close(other, plain)


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
    # Two pictures, then one: 4 and 2 rows, each a program; graphs are kept of 4 and 8 rows, so one lacks two rows.
    assert [figure["programs"] for figure in padded] == [2, 1]
    assert padded[0]["dummy"] == 0.0 < padded[1]["dummy"]
    assert len(stages["no_wait"]["figures"]) == 6


def test_figures_stay_until_others_come_in_their_place(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    common = ["--quick", "--device", "cpu", "--stages", "packs", "--out", str(out)]
    for ways, sizes in (("eager", "1"), ("eager, channels-last", "1"), ("eager", "2,1")):
        assert gpu.main([*common, "--ways", ways, "--sizes", sizes]) == 0
    figures = json.loads(out.read_text("utf-8"))["stages"]["packs"]["figures"]
    speeds = [(figure["way"], figure["pictures"]) for figure in figures if "images_per_s" in figure]
    assert sorted(speeds) == [("eager", 1), ("eager", 2), ("eager, channels-last", 1)]
    assert sum("right" in figure for figure in figures) == 2
    with pytest.raises(SystemExit):
        gpu.main(["--ways", "fast"])


def test_nothing_is_begun_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = count()  # a second passes between two looks at it

    def endless(_: Setup) -> Iterator[Figure]:
        for number in count():
            yield {"what": str(number)}

    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    for name in ("ceilings", "attention"):
        monkeypatch.setitem(gpu.STAGES, name, (endless, 60.0))
    kept = Kept(tmp_path / "gpu.json", {"quick": True}, setup, deadline=6.0)
    assert gpu.run(["ceilings", "attention"], kept) == 0
    # Looked at before the stage, for its limit, at its beginning, and after each figure.
    assert [(name, len(stage["figures"]), stage["cut"]) for name, stage in kept.stages.items()] == [
        ("ceilings", 4, True)
    ]
    assert "attention" in capsys.readouterr().err


def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    out.write_text('{"quick": false, "dtype": "torch.bfloat16"}', "utf-8")
    assert gpu.main(["--quick", "--device", "cpu", "--stages", "ceilings", "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err and "bfloat16" in out.read_text("utf-8")


def test_what_is_best_is_of_the_dtype_that_the_reference_is_measured_in() -> None:
    def figure(dtype: str, rate: float) -> Figure:
        return {"way": dtype, "dtype": dtype, "pictures": 1, "images_per_s": rate, "tflops": rate}

    packs = [figure("torch.bfloat16", 10.0), figure("torch.float16", 20.0)]
    products = [{"what": "matmul", "tflops": 40.0}]
    known = {
        "quick": False,
        "dtype": "torch.bfloat16",
        "stages": {
            "packs": {"figures": packs},
            "ceilings": {"figures": products},
            "reference": {"figures": [figure("torch.bfloat16", 5.0)]},
        },
    }
    gpu.summarize(known)
    assert known["best"]["times_the_reference"] == 2.0 and known["best"]["share"] == 0.25  # type: ignore[index]
    assert packs[1]["share"] == 0.5
