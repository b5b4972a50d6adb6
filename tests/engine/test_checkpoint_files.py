"""A file that is dangerous, damaged, misnamed or something else is told in one sentence that names it and a remedy."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_engine import layouts
from sd_engine.errors import WeightsError
from sd_engine.families import SD2, detect
from sd_engine.model import SD1, Model
from sd_engine.namings import SINGLE_FILE, recognised
from sd_engine.tensorfile import HEADER_LIMIT, joined
from sd_engine.weights import load_model
from tests.engine.ldm_names import MetaFile
from tests.engine.models import UNET, configs_of, original_tensors, refusal

TENSORS = {"a": torch.ones(3), "b": torch.zeros(2, 2)}


# --- safetensors


def safetensors_bytes(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), id="overlapping"),
        pytest.param({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20), id="with a hole"),
        pytest.param({"a": entry(0, 8, [4])}, bytes(8), id="too short for its shape"),
        pytest.param({"a": entry(0, 8, [2])}, bytes(4), id="past the end"),
        pytest.param({"a": entry(0, 8, [2])}, bytes(12), id="with more behind"),
        pytest.param({"a": {"dtype": "F12", "shape": [2], "data_offsets": [0, 8]}}, bytes(8), id="unknown dtype"),
    ],
)
def test_offsets_that_lie_are_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, data))
    assert "is not a whole safetensors file" in refusal(tmp_path / "a.safetensors")


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + b'{"a": 1}')
    assert "is not a whole safetensors file: its 16 bytes end early" in refusal(tmp_path / "a.safetensors")


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little") + b"{")
        file.truncate(HEADER_LIMIT + 100)  # a hole: the file takes no disk
    assert f"a header of {HEADER_LIMIT + 1} bytes, above the limit" in refusal(path)


# --- misnamed files


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; download it again"),
        (b"<!DOCTYPE html><html>Log in</html>", "is a page of text, not weights"),
        (b"\n  <html>404</html>", "is a page of text, not weights"),
        (b'{"error": "gated"}', "is a page of text, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run `git lfs pull`"),
        (b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "is not a whole "),
    ],
)
def test_something_else_under_the_name_of_a_checkpoint_is_told(
    tmp_path: Path, suffix: str, content: bytes, said: str
) -> None:
    (tmp_path / f"model{suffix}").write_bytes(content)
    assert said in refusal(tmp_path / f"model{suffix}")


def test_a_checkpoint_under_the_name_of_the_other_format_is_told(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.safetensors")
    assert "is a pickle file under another name; rename it to a.ckpt" in refusal(tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").rename(tmp_path / "b.ckpt")
    assert "is a safetensors file under another name; rename it to b.safetensors" in refusal(tmp_path / "b.ckpt")


# --- other models


def names(*keys: str, shape: tuple[int, ...] = (1,)) -> dict[str, Tensor]:
    return {key: torch.zeros(shape) for key in keys}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (names("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "is a LoRA, not a Stable Diffusion"),
        (names("unet.down_blocks.0.attentions.0.processor.to_q_lora.down.weight", "x.lora.up.weight"), "is a LoRA"),
        (names("control_model.time_embed.0.weight"), "is a ControlNet"),
        (names("controlnet_cond_embedding.conv_in.weight", "conv_in.weight"), "is a ControlNet"),
        (names("conditioner.embedders.0.transformer.weight", "model.diffusion_model.out.0.bias"), "is an SDXL model"),
        (names("model.diffusion_model.joint_blocks.0.x.weight"), "is a diffusion transformer (SD 3 or Flux)"),
        (names("double_blocks.0.img_attn.norm.key_norm.scale"), "is a diffusion transformer (SD 3 or Flux)"),
        (names("depth_model.model.pretrained.cls_token"), "is a depth-to-image model"),
        (names("down_blocks.0.motion_modules.0.proj_in.weight"), "is a motion module"),
        (names("emb_params"), "is a textual inversion embedding"),
        (names("model.0.weight", "model.1.sub.0.RDB1.conv1.weight"), "is no Stable Diffusion checkpoint: 2 unexpected"),
        ({}, "is no Stable Diffusion checkpoint"),
    ],
)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    assert said in refusal(tmp_path / "other.safetensors")


def test_an_embedding_in_its_pickled_form_is_called_by_its_name(tmp_path: Path) -> None:
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}}, tmp_path / "cat.pt")
    assert "is a textual inversion embedding" in refusal(tmp_path / "cat.pt")


@pytest.mark.parametrize(
    ("prefix", "bare", "said"),
    [
        ("first_stage_model.", False, "is a VAE alone, not a whole model; load the model that it belongs to"),
        ("first_stage_model.", True, "is a VAE alone"),
        ("model.diffusion_model.", False, "is a U-Net alone, not a whole model; put it into a folder with the others"),
        ("model.diffusion_model.", True, "is a U-Net alone"),
        ("cond_stage_model.transformer.", False, "is a text encoder alone"),
    ],
)
def test_a_component_alone_is_told_and_what_to_do_with_it(
    tmp_path: Path, tiny_folder: Path, prefix: str, bare: bool, said: str
) -> None:
    tensors = {key: tensor for key, tensor in original_tensors(tiny_folder).items() if key.startswith(prefix)}
    cut = {key.removeprefix(prefix) if bare else key: tensor for key, tensor in tensors.items()}
    save_file(cut, tmp_path / "part.safetensors")
    assert said in refusal(tmp_path / "part.safetensors")


# --- numbers


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_one_number_that_is_not_finite_is_found(
    tmp_path: Path, tiny_folder: Path, model: Model, value: float, suffix: str
) -> None:
    tensors, path = original_tensors(tiny_folder), tmp_path / f"bad{suffix}"
    tensors["model.diffusion_model.out.2.weight"][0, 1, 2, 0] = value
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    message = refusal(path, tokenizer=tiny_folder / "tokenizer", configs=configs_of(model))
    assert "model.diffusion_model.out.2.weight has numbers that are not finite" in message


def test_a_number_too_large_for_the_dtype_is_not_taken_for_damage(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / f"{UNET}.safetensors").items()}
    tensors["conv_out.bias"][0] = 1e6
    save_file(tensors, folder / f"{UNET}.safetensors")
    with pytest.raises(WeightsError, match=r"conv_out\.bias has numbers too large for torch\.float16; .*bfloat16"):
        load_model(folder, dtype=torch.float16)
    bias = load_model(folder, dtype=torch.bfloat16).unet.get_parameter("conv_out.bias")
    assert float(bias[0]) == pytest.approx(1e6, rel=1e-2)  # bfloat16 has 8 bits


def test_whole_numbers_are_no_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / f"{UNET}.safetensors").items()}
    save_file(tensors | {"conv_out.bias": torch.zeros(4, dtype=torch.int8)}, folder / f"{UNET}.safetensors")
    with pytest.raises(WeightsError, match=r"1 not of floating point: conv_out\.bias \(torch\.int8\)"):
        load_model(folder)


# --- an index and its files


def sharded(folder: Path, weight_map: object) -> Path:
    folder.mkdir()
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), "utf-8")
    return index


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "../one.safetensors"}, "may only name files beside it"),
        ({"a": "/etc/passwd"}, "may only name files beside it"),
        ({"a": "two.safetensors"}, "names two.safetensors, which is not there"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "1 not where it says: c"),
        ({"a": "one.safetensors"}, "1 not in it: b"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, weight_map: object, said: str) -> None:
    index = sharded(tmp_path / "shards", weight_map)
    with pytest.raises(WeightsError, match=re.escape(said)), layouts.opened(index):
        pass


def test_a_tensor_in_two_shards_is_refused() -> None:
    one, two = MetaFile({"a": torch.ones(1)}), MetaFile({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(WeightsError, match="1 not in it: a"):
        joined(Path("index.json"), {"a": "1", "b": "2"}, {"1": one, "2": two})


# --- what a single file is taken for


def probe(width: int, channels: int = 4, *more: str, **hints: object) -> MetaFile:
    """The two tensors that the family is told by, and what a file may say besides."""
    prefix = "model.diffusion_model."
    shapes = {
        f"{prefix}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{prefix}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
    }
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return MetaFile(tensors | names(*more), **hints)


def spoken(width: int, prediction: str) -> MetaFile:
    """A file whose header says what the model predicts."""
    return MetaFile(probe(width).tensors, **{"modelspec.prediction_type": prediction})


@pytest.mark.parametrize(
    ("file", "prediction", "size"),
    [
        pytest.param(probe(768), "epsilon", 64, id="SD 1"),
        pytest.param(probe(768, 9), "epsilon", 64, id="SD 1 inpainting"),
        pytest.param(probe(1024), "v_prediction", 96, id="SD 2"),
        pytest.param(probe(1024, global_step=875000), "epsilon", 64, id="SD 2 base"),
        pytest.param(probe(1024, global_step=110000), "v_prediction", 96, id="SD 2 768-v"),
        pytest.param(probe(1024, 9), "epsilon", 64, id="SD 2 inpainting"),
        pytest.param(spoken(1024, "epsilon"), "epsilon", 64, id="SD 2 that says so"),
        pytest.param(spoken(768, "v"), "v_prediction", 64, id="SD 1 that says so"),
        pytest.param(probe(768, 4, "v_pred"), "v_prediction", 64, id="SD 1 with a key that says so"),
    ],
)
def test_what_a_model_predicts_is_told_by_the_references_rule_or_by_the_file(
    file: MetaFile, prediction: str, size: int
) -> None:
    found = detect(file, recognised(file.keys, SINGLE_FILE)["unet"])
    assert (found.schedule.prediction, found.unet.sample_size) == (prediction, size)


def test_what_the_caller_says_a_model_predicts_goes_before_the_rule() -> None:
    file = probe(1024)
    found = detect(file, recognised(file.keys, SINGLE_FILE)["unet"], "epsilon")
    assert found == replace(SD2, unet=replace(SD2.unet, sample_size=64), schedule=SD1.schedule)


def test_a_file_can_say_that_its_noise_ends_in_pure_noise() -> None:
    file = probe(1024, 4, "ztsnr", "v_pred")
    assert detect(file, recognised(file.keys, SINGLE_FILE)["unet"]).schedule.zero_snr


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (probe(2048), "takes texts of width 2048, and SD 1.x takes 768, SD 2.x takes 1024"),
        (probe(1024, 5), "the U-Net takes 5 channels"),
        (probe(768, 8), "the U-Net takes 8 channels"),
    ],
)
def test_a_unet_of_another_family_is_refused(file: MetaFile, said: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(said)):
        detect(file, recognised(file.keys, SINGLE_FILE)["unet"])
