"""Models load from both layouts, and whatever is wrong with a model is told in one sentence that names the file."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.errors import WeightsError
from sd_engine.model import Configs, Model, shipped_model
from sd_engine.weights import load_model
from tests.engine.half import cpu_with_units
from tests.engine.models import TEXT, UNET, VAE, configs_of, differing, original_tensors
from tests.tiny_model import make_tiny_model


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


def assert_equal(a: Model, b: Model) -> None:
    assert differing(a, b) == []


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    # Copied before the file is written: the tensors are mapped from it.
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    save_file({key: tensor.contiguous() for key, tensor in change(tensors).items()}, file)


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), "utf-8")


def renamed(pattern: str, replacement: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {re.sub(pattern, replacement, key): tensor for key, tensor in tensors.items()}


# --- what loads


def test_a_loaded_model_is_whole_frozen_and_in_evaluation_mode(model: Model, tiny_folder: Path) -> None:
    assert (model.name, model.size, model.factor, model.latent_channels) == ("tiny", (64, 64), 8, 4)
    for module in (model.text_encoder, model.unet, model.vae):
        assert not any(part.training for part in module.modules())
        for tensor in (*module.parameters(), *module.buffers()):
            assert (tensor.device, tensor.dtype, tensor.requires_grad) == (model.device, model.dtype, False)


@torch.no_grad()
def test_the_reference_reads_the_very_same_folder_alike(model: Model, tiny_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder)
    context = model.text_encoder(model.tokenizer.encode(["a red cat", ""]))
    theirs = pipeline.text_encoder(model.tokenizer.encode(["a red cat", ""])).last_hidden_state
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    noise = model.unet(latents, torch.tensor([10.0, 900.0]), theirs)
    # The tolerances, and their reasons, of test_clip.py and test_unet.py; the outputs are about one.
    assert float((context - theirs).abs().max()) < 1e-5
    assert float((noise - pipeline.unet(latents, torch.tensor([10.0, 900.0]), theirs).sample).abs().max()) < 2e-5


def test_the_schedule_is_the_folders_own(tmp_path: Path) -> None:
    assert load_model(make_tiny_model(tmp_path / "v", prediction="v_prediction")).schedule.prediction == "v_prediction"


def test_linear_projections_load(tmp_path: Path) -> None:
    assert load_model(make_tiny_model(tmp_path / "linear", linear_projection=True)).unet.config.linear_projection


def test_weights_are_converted_to_the_dtype_that_is_asked_for(tiny_folder: Path, model: Model) -> None:
    with cpu_with_units():
        half = load_model(str(tiny_folder), "cpu", torch.bfloat16)
    assert {p.dtype for p in half.unet.parameters()} == {half.dtype} == {torch.bfloat16}
    assert torch.equal(half.unet.conv_in.weight, model.unet.conv_in.weight.bfloat16())


def test_the_fp16_variant_is_taken_when_it_is_the_only_one(tmp_path: Path, model: Model) -> None:
    variant = load_model(make_tiny_model(tmp_path / "tiny", variant="fp16", dtype=torch.float16))
    assert variant.dtype == torch.float32
    assert torch.equal(variant.unet.conv_in.weight, model.unet.conv_in.weight.half().float())


def test_the_pipelines_index_may_be_left_out(folder: Path, model: Model) -> None:
    (folder / "model_index.json").unlink()
    assert_equal(load_model(folder), model)


def test_files_of_old_libraries_load_alike(folder: Path, model: Model) -> None:
    """`text_model.` and stored position ids (transformers 4), query/key/value/proj_attn (diffusers before 0.17)."""
    rewrite(folder / f"{TEXT}.safetensors", renamed("^(text_model.)?", "text_model."))
    rewrite(
        folder / f"{TEXT}.safetensors",
        lambda tensors: tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    )
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        rewrite(folder / f"{VAE}.safetensors", renamed(rf"(mid_block\.attentions\.0\.){new}\.", rf"\1{old}."))
    assert_equal(load_model(folder), model)


# --- the original single file


@pytest.fixture(scope="module")
def original(tiny_folder: Path) -> dict[str, Tensor]:
    return original_tensors(tiny_folder)


def test_an_original_checkpoint_draws_what_the_folder_draws(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path
) -> None:
    save_file(original, tmp_path / "one-file.safetensors")
    loaded = load_model(
        tmp_path / "one-file.safetensors", tokenizer=tiny_folder / "tokenizer", configs=configs_of(model)
    )
    assert loaded.name == "one-file"
    assert_equal(loaded, model)


def test_a_tokenizer_beside_the_checkpoint_is_found(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path
) -> None:
    save_file(original, tmp_path / "a.safetensors")
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    assert_equal(load_model(tmp_path / "a.safetensors", configs=configs_of(model)), model)


def test_a_checkpoint_without_a_tokenizer_says_what_to_do(
    tmp_path: Path, original: dict[str, Tensor], model: Model
) -> None:
    save_file(original, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"pass tokenizer=FOLDER with vocab\.json and merges\.txt"):
        load_model(tmp_path / "a.safetensors", configs=configs_of(model))


def test_a_checkpoint_of_another_family_is_refused_with_its_strange_keys(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path
) -> None:
    save_file(original | {"some_other_model.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError, match=r"more\.safetensors is not a .* original names: 1 unexpected: some_other"):
        load_model(tmp_path / "more.safetensors", tokenizer=tiny_folder / "tokenizer", configs=configs_of(model))


def test_a_checkpoint_of_another_size_is_refused(
    tmp_path: Path, original: dict[str, Tensor], tiny_folder: Path
) -> None:
    """Without `configs` a single file must be SD 1.x or 2.x at full size, as the width of its texts tells."""
    save_file(original, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors: its U-Net takes texts of width 32, and SD 1\.x takes 768"):
        load_model(tmp_path / "a.safetensors", tokenizer=tiny_folder / "tokenizer")


# --- keys that do not fit


def test_missing_unexpected_and_misshapen_keys_are_listed_together(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3]
        tensors["stranger.weight"] = tensors.pop("conv_out.bias")
        return tensors

    rewrite(folder / f"{UNET}.safetensors", change)
    with pytest.raises(WeightsError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert f"{UNET}.safetensors" in message
    assert "1 missing: conv_out.bias" in message and "1 unexpected: stranger.weight" in message
    assert "1 wrong shape: conv_in.weight [32, 3, 3, 3] instead of [32, 4, 3, 3]" in message


def test_a_long_list_of_keys_is_cut(folder: Path) -> None:
    rewrite(folder / f"{UNET}.safetensors", lambda _: {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"missing: (\S+, ){7}\S+ and \d+ more"):
        load_model(folder)


def test_two_keys_for_the_same_place_are_refused(folder: Path) -> None:
    key = "embeddings.token_embedding.weight"

    def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.removeprefix("text_model."): t for k, t in tensors.items()} | {f"text_model.{key}": torch.zeros(1)}

    rewrite(folder / f"{TEXT}.safetensors", double)
    with pytest.raises(WeightsError, match="1 doubled: "):
        load_model(folder)


# --- files that do not do


@pytest.mark.parametrize("part", [TEXT, UNET, VAE])
def test_a_missing_weights_file_is_named(folder: Path, part: str) -> None:
    (folder / f"{part}.safetensors").unlink()
    with pytest.raises(
        WeightsError, match=rf"{Path(part).parent} has no weights: neither {Path(part).name}\.safetensors nor"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    "name", ["text_encoder/config.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"]
)
@pytest.mark.parametrize(
    ("text", "said"), [(None, "is missing"), ("{", "cannot be read as JSON"), ("[]", "does not hold a JSON object")]
)
def test_a_configuration_that_is_missing_or_broken_is_named(
    folder: Path, name: str, text: str | None, said: str
) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text, "utf-8")
    with pytest.raises(WeightsError, match=f"{re.escape(name)} {said}"):
        load_model(folder)


def test_a_setting_that_is_missing_is_named(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(WeightsError, match=r"unet/config\.json lacks the setting 'block_out_channels'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("unet/config.json", {"class_embed_type": "timestep"}),
        ("vae/config.json", {"use_quant_conv": False}),
        ("text_encoder/config.json", {"hidden_act": "relu"}),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
    ],
)
def test_what_is_not_built_is_refused_with_file_and_value(folder: Path, file: str, settings: dict[str, Any]) -> None:
    edit(folder / file, **settings)
    value = str(next(iter(settings.values())))
    with pytest.raises(WeightsError, match=rf"{re.escape(file)}.*{value}.*supported"):
        load_model(folder)


@pytest.mark.parametrize("left", [5, 9, 1000, -1])
def test_a_torn_weights_file_is_refused(folder: Path, left: int) -> None:
    file = folder / f"{UNET}.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors is not a whole safetensors file"):
        load_model(folder)


def test_something_else_under_the_name_of_a_weights_file_is_refused(folder: Path) -> None:
    (folder / f"{VAE}.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n", "utf-8")
    with pytest.raises(WeightsError, match="is a pointer of Git LFS, not the weights themselves; run `git lfs pull`"):
        load_model(folder)


def test_a_path_that_is_nothing_or_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no model at"):
        load_model(tmp_path / "nothing")
    (tmp_path / "model.zip").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"model\.zip has none of the suffixes of a model \(\.safetensors, "):
        load_model(tmp_path / "model.zip")


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(folder: Path) -> None:
    """It would index past the end of the embedding."""
    edit(folder / "text_encoder" / "config.json", vocab_size=100)
    with pytest.raises(WeightsError, match="has 518 tokens, the text encoder only 100"):
        load_model(folder)


@pytest.mark.parametrize("limit", [0, -5, "x", [77]])
def test_a_tokenizer_that_takes_no_word_is_refused(folder: Path, limit: object) -> None:
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    with pytest.raises(WeightsError, match="model_max_length="):
        load_model(folder)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(WeightsError, match="texts of width 768, the text encoder gives 32"):
        Configs(text=ClipConfig(width=32))
    with pytest.raises(WeightsError, match="takes 8 channels"):
        Configs(unet=UNetConfig(in_channels=8))
    with pytest.raises(WeightsError, match="latents have 16"):
        replace(Configs(), vae=VaeConfig(latent_channels=16))


def test_the_shipped_model_is_inside_the_package() -> None:
    assert shipped_model().parts[-3:] == ("sd_engine", "models", "nightshift-mini")
