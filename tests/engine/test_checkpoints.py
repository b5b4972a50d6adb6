"""Whatever layout a checkpoint has, and whatever is chosen of it, the same weights come to the same places."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd_engine.errors import InvalidArgument, InvalidDevice, WeightsError
from sd_engine.filling import Part, fill
from sd_engine.finite import looked_at
from sd_engine.keymaps import KeyMap
from sd_engine.layouts import opened
from sd_engine.model import Model
from sd_engine.weights import load_model
from tests.engine import ldm_names
from tests.engine.models import TEXT, UNET, VAE, configs_of, differing, original_tensors, own
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def original(tiny_folder: Path) -> dict[str, Tensor]:
    return original_tensors(tiny_folder)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same shapes, with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=77)


@pytest.fixture(scope="module")
def other(other_folder: Path) -> Model:
    return load_model(other_folder)


def load_file_of(path: Path, model: Model, tiny_folder: Path, **choice: Any) -> Model:
    return load_model(path, tokenizer=tiny_folder / "tokenizer", configs=configs_of(model), **choice)


# --- the diffusers folder


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_sharded_folder_is_the_whole_one(tmp_path: Path, model: Model, variant: str | None) -> None:
    folder = make_tiny_model(tmp_path / "tiny", max_shard_size="400KB", variant=variant)
    assert len(list(folder.glob("unet/*.safetensors"))) > 2 and len(list(folder.glob("unet/*.json"))) == 2
    assert differing(load_model(folder), model) == []
    assert differing(load_model(folder, variant=variant), model) == []


def test_components_may_be_pickles(folder: Path, model: Model) -> None:
    for name, pickled in ((TEXT, "text_encoder/pytorch_model"), (UNET, UNET), (VAE, VAE)):
        torch.save(own(load_file(folder / f"{name}.safetensors")), folder / f"{pickled}.bin")
        (folder / f"{name}.safetensors").unlink()
    assert differing(load_model(folder), model) == []


def test_the_variant_that_is_asked_for_is_taken_and_the_plain_one_otherwise(folder: Path, model: Model) -> None:
    for name in (TEXT, UNET, VAE):
        tensors = load_file(folder / f"{name}.safetensors")
        save_file({key: tensor.half() for key, tensor in tensors.items()}, folder / f"{name}.fp16.safetensors")
    assert differing(load_model(folder), model) == []
    half = load_model(folder, variant="fp16")
    assert torch.equal(half.unet.conv_in.weight, model.unet.conv_in.weight.half().float())


def test_a_variant_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights of the variant 'ema': neither model\.ema\.safetensors"):
        load_model(folder, variant="ema")


def test_what_an_sd2_folder_has_otherwise_is_read(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "sd2", sd2=True, prediction="v_prediction", zero_snr=True)
    model = load_model(folder)
    assert (model.unet.config.linear_projection, model.unet.config.heads) == (True, (2, 4))
    assert (model.text_encoder.config.activation, model.schedule.prediction) == ("gelu", "v_prediction")
    assert model.schedule.zero_snr


@pytest.mark.parametrize("channels", [5, 8])
def test_a_unet_with_channels_that_nothing_is_given_for_is_refused(tmp_path: Path, channels: int) -> None:
    folder = make_tiny_model(tmp_path / "tiny", in_channels=channels)
    with pytest.raises(WeightsError, match=rf"takes {channels} channels .* models that take 4, or 9 for inpainting"):
        load_model(folder)


# --- the original single file


class ModelCheckpoint:
    """Stands for what the training library leaves in a checkpoint; the files name its module, not this one."""


def save_zip(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": tensors, "global_step": 470000, "epoch": 3}, path)


def save_bare(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save(tensors, path)


def save_old(tensors: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("save", [save_zip, save_bare, save_old])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
def test_a_pickled_checkpoint_is_the_folder(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path,
    save: Callable[[dict[str, Tensor], Path], None], suffix: str,
) -> None:  # fmt: skip
    save(original, tmp_path / f"model{suffix}")
    assert differing(load_file_of(tmp_path / f"model{suffix}", model, tiny_folder), model) == []


def test_what_the_training_library_left_in_a_pickle_is_not_needed_to_read_it(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published SD 1.x files name a class of pytorch_lightning, which nobody has to have."""
    module = "pytorch_lightning.callbacks.model_checkpoint"
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(sys.modules[module], "ModelCheckpoint", ModelCheckpoint, raising=False)
        patch.setattr(ModelCheckpoint, "__module__", module)
        callbacks = {ModelCheckpoint: {"best_model_score": torch.tensor(0.1)}}
        torch.save({"state_dict": original, "callbacks": callbacks}, tmp_path / "model.ckpt")
    assert differing(load_file_of(tmp_path / "model.ckpt", model, tiny_folder), model) == []


def test_an_sd2_checkpoint_with_open_clips_names_is_the_folder(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "sd2", sd2=True, prediction="v_prediction")
    wanted = load_model(folder)
    save_file(original_tensors(folder, openclip=True), tmp_path / "sd2.safetensors")
    assert differing(load_file_of(tmp_path / "sd2.safetensors", wanted, folder), wanted) == []


def test_averaged_weights_are_taken_when_they_are_asked_for(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path
) -> None:
    path = tmp_path / "full.safetensors"
    save_file(own(original | ldm_names.averages(original, factor=0.5)), path)
    assert differing(load_file_of(path, model, tiny_folder), model) == []
    averaged = load_file_of(path, model, tiny_folder, ema=True)
    assert differing(averaged, model) == ["unet"]
    assert all(
        torch.equal(ours, plain * 0.5)
        for ours, plain in zip(averaged.unet.parameters(), model.unet.parameters(), strict=True)
    )


def test_averaged_weights_that_are_not_there_are_told(
    tmp_path: Path, original: dict[str, Tensor], model: Model, tiny_folder: Path
) -> None:
    save_file(original, tmp_path / "plain.safetensors")
    with pytest.raises(WeightsError, match=r"plain\.safetensors has no averaged weights .* load it with ema=False"):
        load_file_of(tmp_path / "plain.safetensors", model, tiny_folder, ema=True)
    with pytest.raises(WeightsError, match=r"tiny has no averaged weights \(ema=True\)"):
        load_model(tiny_folder, ema=True)


def test_the_caller_can_say_how_a_model_was_trained(tiny_folder: Path) -> None:
    schedule = load_model(tiny_folder, prediction="v_prediction", zero_snr=True).schedule
    assert (schedule.prediction, schedule.zero_snr) == ("v_prediction", True)
    with pytest.raises(InvalidArgument, match=r"prediction='velocity' is not allowed: epsilon, v_prediction, sample"):
        load_model(tiny_folder, prediction="velocity")


# --- component files, and a VAE given separately


@pytest.mark.parametrize("names", ["diffusers", "LDM"])
def test_a_folder_of_component_files_is_the_whole_folder(
    tmp_path: Path, tiny_folder: Path, original: dict[str, Tensor], model: Model, names: str
) -> None:
    folder = tmp_path / "components"
    shutil.copytree(tiny_folder / "tokenizer", folder / "tokenizer")
    prefixes = {TEXT: "cond_stage_model.", UNET: "model.diffusion_model.", VAE: "first_stage_model."}
    for name, prefix in prefixes.items():
        own_part = own({key: tensor for key, tensor in original.items() if key.startswith(prefix)})
        tensors = load_file(tiny_folder / f"{name}.safetensors") if names == "diffusers" else own_part
        save_file(tensors, folder / f"{name.partition('/')[0]}.safetensors")
    assert differing(load_model(folder, configs=configs_of(model)), model) == []


def test_a_component_that_is_not_beside_the_others_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / f"{UNET}.safetensors", tmp_path / "unet.safetensors")
    with pytest.raises(WeightsError, match=r"has no text_encoder\.safetensors beside its U-Net; copy it there"):
        load_model(tmp_path)


def vae_files(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """The VAE of a diffusers folder, in every form that one is given in."""
    original = original_tensors(folder)
    prefixed = {key: tensor for key, tensor in original.items() if key.startswith("first_stage_model.")}
    plain = {key.removeprefix("first_stage_model."): tensor for key, tensor in prefixed.items()}
    save_file(prefixed, tmp_path / "prefixed.safetensors")
    save_file(plain | {"loss.logvar": torch.zeros(())}, tmp_path / "plain.vae.safetensors")
    torch.save({"state_dict": plain | {"model_ema.decay": torch.zeros(())}}, tmp_path / "plain.vae.pt")
    save_file(original, tmp_path / "whole.safetensors")
    files = {path.name: path for path in tmp_path.iterdir() if path.is_file()}
    return {"model": folder, "folder": folder / "vae", "file": folder / f"{VAE}.safetensors", **files}


@pytest.mark.parametrize(
    "form", ["model", "folder", "file", "prefixed.safetensors", "plain.vae.safetensors", "plain.vae.pt",
             "whole.safetensors"],
)  # fmt: skip
def test_a_vae_given_separately_replaces_the_models_own_and_nothing_else(
    tmp_path: Path, tiny_folder: Path, model: Model, other_folder: Path, other: Model, form: str
) -> None:
    mixed = load_model(tiny_folder, vae=vae_files(other_folder, tmp_path)[form])
    assert differing(mixed, model) == ["vae"]
    assert "vae" not in differing(mixed, other)


def test_a_checkpoint_without_a_vae_loads_with_one_and_tells_how_without(
    tmp_path: Path, tiny_folder: Path, original: dict[str, Tensor], model: Model, other_folder: Path, other: Model
) -> None:
    path = tmp_path / "no-vae.safetensors"
    save_file({key: tensor for key, tensor in original.items() if not key.startswith("first_stage_model.")}, path)
    mixed = load_file_of(path, model, tiny_folder, vae=other_folder)
    assert differing(mixed, model) == ["vae"] and "vae" not in differing(mixed, other)
    with pytest.raises(WeightsError, match=r"no-vae\.safetensors has no VAE; give one as vae="):
        load_file_of(path, model, tiny_folder)


def test_a_vae_that_is_none_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is no VAE at .*nothing"):
        load_model(tiny_folder, vae=tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"holds no VAE but U-Net; give the file of a VAE"):
        load_model(tiny_folder, vae=tiny_folder / f"{UNET}.safetensors")


# --- what a model gets besides its weights


@pytest.mark.parametrize("beside", [False, True])
def test_embeddings_in_the_models_folder_or_beside_it_are_handed_over(folder: Path, beside: bool) -> None:
    embeddings = (folder.parent if beside else folder) / "embeddings"
    embeddings.mkdir()
    save_file({"emb_params": torch.ones(2, 32)}, embeddings / "cat-toy.safetensors")
    model = load_model(folder)
    assert {word: tuple(vectors.shape) for word, vectors in model.embeddings.items()} == {"cat-toy": (2, 32)}


def test_embeddings_may_be_elsewhere_and_must_then_be_there(folder: Path, tmp_path: Path) -> None:
    assert load_model(folder).embeddings == {}
    with pytest.raises(WeightsError, match=r"there is no folder .*words with embeddings"):
        load_model(folder, embeddings=tmp_path / "words")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"device": "gpu"}, "device='gpu' is not allowed"),
        ({"dtype": "int8"}, "dtype='int8' is not allowed"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not allowed"),
    ],
)
def test_a_device_or_dtype_that_does_not_exist_is_named(
    tiny_folder: Path, arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidDevice, match=said):
        load_model(tiny_folder, **arguments)


# --- memory


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if "-" in line.split(" ")[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads Linux's account of mapped pages")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_that_is_converted_does_not_stay_in_memory_beside_what_it_became(tmp_path: Path, suffix: str) -> None:
    layers, path = nn.Sequential(*(nn.Linear(512, 512) for _ in range(16))), tmp_path / f"layers{suffix}"
    tensors = own(layers.state_dict())
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    size = path.stat().st_size
    with opened(path) as file:
        part = Part("unet", file, {key: key for key in file.keys}, KeyMap(()), "ours")
        fill(layers, part, torch.device("cpu"), torch.float16)
        # What a page and the kernel's reading ahead leave at each end of a tensor: 128 KB of 1 MB are the bar, and all
        # of it would be there if nothing were given back.
        assert resident(path) < size / 8
        assert all(parameter.dtype == torch.float16 for parameter in layers.parameters())
        with looked_at([(file, part.wanted)], torch.float32):
            fill(layers, part, torch.device("cpu"), torch.float32)
        assert resident(path) > size * 7 / 8, "unconverted tensors are the file's own pages"
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in layers.named_parameters())
