"""From any layout to a folder that the reference library loads strictly, with the same weights in the same places."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

from sd_engine.convert import convert
from sd_engine.errors import WeightsError
from sd_engine.layouts import opened
from sd_engine.model import Model
from sd_engine.weights import load_model
from tests.engine import ldm_names
from tests.engine.models import TEXT, UNET, VAE, configs_of, differing, original_tensors, own
from tests.tiny_model import make_tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "SD 1": {},
    "SD 1 inpainting": {"in_channels": 9},
    "SD 2": {"sd2": True, "prediction": "v_prediction", "zero_snr": True},
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("source") / "source", **KINDS[kind])


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.fixture(scope="module")
def converted(kind: str, folder: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The original single file of that model, converted."""
    place = tmp_path_factory.mktemp("converted")
    save_file(original_tensors(folder, openclip=kind == "SD 2"), place / "original.safetensors")
    tokenizer = folder / "tokenizer"
    return convert(place / "original.safetensors", place / "folder", tokenizer=tokenizer, configs=configs_of(model))


def test_an_original_checkpoint_comes_back_as_the_folder_that_it_was(converted: Path, model: Model) -> None:
    back = load_model(converted)
    assert configs_of(back) == configs_of(model)
    assert differing(back, model) == []


@torch.no_grad()
def test_the_reference_loads_what_was_converted_strictly_and_gives_the_same(
    kind: str, converted: Path, folder: Path, model: Model
) -> None:
    x, t = torch.randn(2, model.unet.config.in_channels, 8, 8), torch.tensor([10.0, 900.0])
    context, ids = torch.randn(2, 77, 32), model.tokenizer.encode(["a red cat", ""])
    outputs: list[list[torch.Tensor]] = []
    encoder: Any = CLIPTextModel  # typed as if it gave no loading information
    for source in (converted, folder):
        unet, seen = UNet2DConditionModel.from_pretrained(source / "unet", output_loading_info=True)
        vae, also = AutoencoderKL.from_pretrained(source / "vae", output_loading_info=True)
        text, besides = encoder.from_pretrained(source / "text_encoder", output_loading_info=True)
        assert not any(kept for info in (seen, also, besides) for kept in info.values()), "not loaded strictly"
        moments = vae.encode(vae.decode(x[:, :4]).sample).latent_dist.mean
        outputs.append([unet(x, t, context).sample, moments, text(ids).last_hidden_state])
    # The same kernels on the same weights: not a bit differs.
    assert all(map(torch.equal, *outputs))


def test_the_reference_takes_the_folder_as_a_pipeline_with_the_models_own_schedule(kind: str, converted: Path) -> None:
    index = json.loads((converted / "model_index.json").read_text("utf-8"))
    inpainting = KINDS[kind].get("in_channels") == 9
    assert index["_class_name"] == ("StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline")
    pipeline: Any = DiffusionPipeline.from_pretrained(converted)
    settings = pipeline.scheduler.config
    assert settings.prediction_type == KINDS[kind].get("prediction", "epsilon")
    assert settings.rescale_betas_zero_snr == KINDS[kind].get("zero_snr", False)


def test_what_is_chosen_of_a_checkpoint_is_what_is_written(tiny_folder: Path, tmp_path: Path) -> None:
    original = original_tensors(tiny_folder)
    save_file(own(original | ldm_names.averages(original)), tmp_path / "full.safetensors")
    plain = load_model(tiny_folder)
    choice: dict[str, Any] = {"configs": configs_of(plain), "ema": True, "prediction": "v_prediction", "zero_snr": True}
    written = load_model(convert(tmp_path / "full.safetensors", tmp_path / "out", tokenizer=tiny_folder / "tokenizer",
                                 **choice))  # fmt: skip
    assert differing(written, plain) == ["unet"]
    assert torch.equal(written.unet.conv_in.weight, plain.unet.conv_in.weight * 0.5)
    assert (written.schedule.prediction, written.schedule.zero_snr) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, "fp16", torch.float16),
        (torch.float16, torch.float32, torch.float32),
    ],
)
def test_the_dtype_is_the_sources_or_what_is_asked_for(
    tmp_path: Path, stored: torch.dtype, asked: Any, written: torch.dtype
) -> None:
    source = make_tiny_model(tmp_path / "source", dtype=stored)
    target = convert(source, tmp_path / "target", asked)
    for name in (TEXT, UNET, VAE):
        with opened(target / f"{name}.safetensors") as file:
            assert {file.dtype(key) for key in file.keys} == {written}


def test_only_the_tokenizers_own_files_travel(tiny_folder: Path, tmp_path: Path) -> None:
    target = convert(tiny_folder, tmp_path / "target")
    names = {path.name for path in (target / "tokenizer").iterdir()}
    assert {"vocab.json", "merges.txt"} <= names <= {path.name for path in (tiny_folder / "tokenizer").iterdir()}


def test_a_folder_that_is_there_is_not_written_over(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("mine", "utf-8")
    with pytest.raises(WeightsError, match=r"target is there already; give a new folder"):
        convert(tiny_folder, tmp_path / "target")
    (tmp_path / "target" / "precious").unlink()
    assert (convert(tiny_folder, tmp_path / "target") / "model_index.json").exists(), (
        "an empty folder is as good as new"
    )


def test_a_conversion_that_fails_leaves_nothing_behind(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("sd_engine.convert.copy_tokenizer", full)
    with pytest.raises(WeightsError, match=r"target cannot be written \(no space left on device\); make room"):
        convert(tiny_folder, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_is_told_and_nothing_stays(tiny_folder: Path, tmp_path: Path) -> None:
    """Files of at most 100 kB, as the system's own limit: what a full disk does to the library that writes them."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"target cannot be written \(.*; make room"):
            convert(tiny_folder, tmp_path / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
