"""What a path holds is told without reading tensors, whether a model is sound by reading all of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_engine.checkpoint import Choice
from sd_engine.clip import ClipTextEncoder
from sd_engine.families import SD2
from sd_engine.inspection import Inspection, inspect, verify
from sd_engine.keymaps import diffusers_name
from sd_engine.model import SD1, Configs, shipped_model
from sd_engine.tensorfile import SafetensorsFile
from sd_engine.unet import UNet
from sd_engine.vae import Vae
from sd_engine.weights import load_model
from tests.engine import ldm_names
from tests.engine.models import UNET, configs_of, original_tensors, own
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def choice(tiny_folder: Path) -> Choice:
    """The tiny model's configurations, which a single file cannot say."""
    return Choice(configs=configs_of(load_model(tiny_folder)))


@pytest.fixture(scope="module")
def original(tiny_folder: Path) -> dict[str, Tensor]:
    return original_tensors(tiny_folder)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_: object, key: str) -> Tensor:
        raise AssertionError(f"{key} was read")

    monkeypatch.setattr(SafetensorsFile, "tensor", read)


def counted(found: Inspection) -> dict[str, tuple[int, dict[str, int]]]:
    return {part.component: (part.tensors, dict(part.dtypes)) for part in found.parts}


@pytest.mark.usefixtures("nothing_is_read")
def test_a_folder_is_described_without_reading_a_tensor() -> None:
    found = inspect(shipped_model())
    assert (found.layout, found.problems, found.ema) == ("diffusers folder", (), False)
    assert (found.in_channels, found.prediction, found.zero_snr, found.size) == (4, "v_prediction", False, 96)
    assert {part.component for part in found.parts} == {"text_encoder", "unet", "vae"}
    for part in found.parts:
        assert part.dtypes == {"fp16": part.tensors} and part.nbytes == 2 * part.parameters
        # The header is what else is in the file.
        assert 0 < part.file.stat().st_size - part.nbytes < 100_000


@pytest.mark.usefixtures("nothing_is_read")
@pytest.mark.parametrize(
    ("configs", "kind", "prediction", "text"),
    [
        (SD1, "SD 1.x", "epsilon", 196),
        (replace(SD1, unet=replace(SD1.unet, in_channels=9)), "SD 1.x inpainting", "epsilon", 196),
        (SD2, "SD 2.x", "v_prediction", 24 * 12 + 4),
    ],
)
def test_a_single_file_of_full_size_is_described_without_reading_a_tensor(
    tmp_path: Path, configs: Configs, kind: str, prediction: str, text: int
) -> None:
    """Its numbers are a hole in the file, which takes no disk."""
    with torch.device("meta"):
        modules = {"text_encoder": ClipTextEncoder(configs.text), "unet": UNet(configs.unet), "vae": Vae(configs.vae)}
    states = [
        {diffusers_name(component, name): tensor for name, tensor in module.state_dict().items()}
        for component, module in modules.items()
    ]
    path = write_hole(ldm_names.checkpoint(*states), tmp_path / "sd.safetensors")
    assert path.stat().st_blocks * 512 < 1_000_000 < 4_000_000_000 < path.stat().st_size
    found = inspect(path)
    assert (found.layout, found.kind, found.prediction, found.problems) == ("single file", kind, prediction, ())
    assert (found.in_channels, found.context_width) == (configs.unet.in_channels, configs.unet.context_width)
    # 23 of OpenCLIP's 24 layers are used, all of them are in the file, with 12 tensors each; 4 are around them.
    assert counted(found) == {
        "text_encoder": (text, {"fp32": text}),
        "unet": (686, {"fp32": 686}),
        "vae": (248, {"fp32": 248}),
    }


def write_hole(tensors: dict[str, Tensor], path: Path) -> Path:
    """A safetensors file of fp32 tensors that are all zero and were never written."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_single_file_with_averages_says_so(tmp_path: Path, original: dict[str, Tensor], choice: Choice) -> None:
    path = tmp_path / "full.safetensors"
    save_file(own(original | ldm_names.averages(original)), path)
    found = inspect(path, choice)
    assert (found.layout, found.ema, found.problems, found.context_width) == ("single file", True, (), 32)
    assert verify(path, choice) == []


def test_an_inpainting_model_says_so(tmp_path: Path) -> None:
    found = inspect(make_tiny_model(tmp_path / "tiny", in_channels=9))
    assert (found.kind.endswith("inpainting"), found.in_channels, found.problems) == (True, 9, ())


def test_what_is_no_model_is_called_by_its_name_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(4, 8, dtype=torch.float16)}, path)
    found = inspect(path)
    assert (found.kind, found.layout) == ("LoRA", "file")
    assert counted(found) == {"tensors": (1, {"fp16": 1})}
    (problem,) = found.problems
    assert "style.safetensors is a LoRA" in problem


def test_a_vae_alone_is_called_one(tmp_path: Path, original: dict[str, Tensor]) -> None:
    save_file({k: t for k, t in original.items() if k.startswith("first_stage_model.")}, tmp_path / "vae.safetensors")
    found = inspect(tmp_path / "vae.safetensors")
    assert found.kind == "VAE" and list(counted(found)) == ["vae"] and len(found.problems) == 1


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "there is no model at"),
        (lambda path: path.mkdir(), "text_encoder/config.json is missing"),
        (lambda path: path.write_bytes(b"<html>"), "has none of the suffixes"),
    ],
)
def test_what_cannot_be_opened_is_a_problem_not_an_error(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "thing"
    make(path)
    (problem,) = inspect(path).problems
    assert said in problem
    assert verify(path) == [problem]


def test_a_torn_file_is_a_problem_not_an_error(folder: Path) -> None:
    file = folder / f"{UNET}.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for problems in (inspect(folder).problems, tuple(verify(folder))):
        (problem,) = problems
        assert f"{UNET}.safetensors is not a whole safetensors file" in problem


def test_names_and_shapes_that_do_not_fit_are_found_by_both(folder: Path) -> None:
    file = folder / f"{UNET}.safetensors"
    tensors = own(load_file(file))
    tensors["stranger"] = tensors.pop("conv_out.bias")
    save_file(tensors, file)
    assert "1 missing: conv_out.bias; 1 unexpected: stranger" in inspect(folder).problems[0]
    assert verify(folder) == list(inspect(folder).problems)


def test_every_number_is_read_and_each_damaged_part_is_one_problem(folder: Path) -> None:
    file = folder / f"{UNET}.safetensors"
    tensors = own(load_file(file))
    tensors["conv_in.weight"][0, 0, 0, 0] = torch.nan
    tensors["conv_out.bias"][3] = -torch.inf
    save_file(tensors, file)
    assert inspect(folder).problems == ()
    (problem,) = verify(folder)
    assert "not finite (NaN or infinity): 2 tensors: conv_in.weight, conv_out.bias; download it again" in problem


def test_what_no_model_is_made_of_may_be_damaged(tmp_path: Path) -> None:
    """The layer of OpenCLIP's text encoder that SD 2.x does not draw with."""
    folder = make_tiny_model(tmp_path / "sd2", sd2=True)
    tensors = original_tensors(folder, openclip=True)
    tensors["cond_stage_model.model.transformer.resblocks.2.ln_1.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "sd2.safetensors")
    assert verify(tmp_path / "sd2.safetensors", Choice(configs=configs_of(load_model(folder)))) == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_of_eight_bits_are_read_too(folder: Path, dtype: torch.dtype) -> None:
    file = folder / f"{UNET}.safetensors"
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert verify(folder) == []
    tensors["conv_in.weight"] = torch.full_like(tensors["conv_in.weight"], torch.nan)
    save_file(tensors, file)
    (problem,) = verify(folder)
    assert "1 tensors: conv_in.weight" in problem


def test_a_file_of_numbers_that_nobody_knows_is_a_problem_not_an_error(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    save_file({"a": torch.zeros(3, dtype=torch.uint16)}, path)
    found = inspect(path)
    assert (found.layout, found.kind, found.parts) == ("file", "unknown", ())
    assert "is no Stable Diffusion checkpoint" in found.problems[0]


def test_the_shipped_model_is_sound() -> None:
    assert verify(shipped_model()) == []
