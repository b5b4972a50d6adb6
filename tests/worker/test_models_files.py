"""Which files of a model are needed, by their names alone."""

from __future__ import annotations

import pytest

from worker.model_files import BadModel, checkpoint_file, folder_files, is_folder_model, tokenizer_files
from worker.model_pull import model_files

CONFIGS = {"model_index.json", "scheduler/scheduler_config.json"} | {
    f"{part}/config.json" for part in ("text_encoder", "unet", "vae")
}
WORDS = {"tokenizer/vocab.json", "tokenizer/merges.txt"}
TEXT, UNET, VAE = "text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"
PLAIN = {f"{part}.safetensors" for part in (TEXT, UNET, VAE)}
HALF = {f"{part}.fp16.safetensors" for part in (TEXT, UNET, VAE)}
PICKLES = {"text_encoder/pytorch_model.bin", f"{UNET}.bin", f"{VAE}.bin"}
RUBBISH = {
    "README.md", "unet/run_me.py", "safety_checker/model.safetensors", "tokenizer/extra.bin", "v1-5.ckpt",
    "tokenizer/../../escaped.json", "unet/../../diffusion_pytorch_model.safetensors", "/etc/passwd",
}  # fmt: skip
FOLDER = CONFIGS | WORDS


def test_of_everything_in_a_repository_only_what_is_loaded_is_taken() -> None:
    assert set(folder_files(FOLDER | PLAIN | HALF | PICKLES | RUBBISH)) == FOLDER | PLAIN


def test_a_tiny_decoder_is_taken_along() -> None:
    tiny = {"tiny_decoder/config.json", "tiny_decoder/diffusion_pytorch_model.safetensors"}
    assert folder_files(FOLDER | PLAIN | tiny | {"tiny_decoder/run_me.py"}).keys() == FOLDER | PLAIN | tiny
    assert folder_files(FOLDER | PLAIN | {"tiny_decoder/config.json"}).keys() == FOLDER | PLAIN


def test_a_variant_is_taken_where_it_is_and_gets_the_plain_name() -> None:
    names = FOLDER | PLAIN | {f"{UNET}.fp16.safetensors"}
    chosen = folder_files(names, variant="fp16")
    assert chosen[f"{UNET}.fp16.safetensors"] == f"{UNET}.safetensors"
    assert chosen.keys() == FOLDER | {f"{TEXT}.safetensors", f"{UNET}.fp16.safetensors", f"{VAE}.safetensors"}


def test_the_only_variant_is_taken_unasked() -> None:
    assert folder_files(FOLDER | HALF).keys() == FOLDER | HALF


def test_a_variant_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadModel, match=r"no weights of the variant 'bf16' \(there is: fp16, the plain one\)"):
        folder_files(FOLDER | PLAIN | HALF, variant="bf16")


def test_a_pickle_is_taken_only_where_there_are_no_safetensors_of_any_variant() -> None:
    names = FOLDER | PICKLES | {f"{UNET}.fp16.safetensors", f"{VAE}.safetensors"}
    wanted = {"text_encoder/pytorch_model.bin", f"{UNET}.fp16.safetensors", f"{VAE}.safetensors"}
    assert folder_files(names).keys() == FOLDER | wanted


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        ("{}.safetensors.index.json", "{}-0000{}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}.fp16-0000{}-of-00002.safetensors"),
        ("{}.safetensors.index.fp16.json", "{}-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_come_with_their_index_and_keep_their_names(index: str, shard: str) -> None:
    shards = {index.format(UNET), shard.format(UNET, 1), shard.format(UNET, 2)}
    chosen = folder_files(FOLDER | (PLAIN - {f"{UNET}.safetensors"}) | shards)
    assert shards <= chosen.keys() and all(chosen[name] == name for name in shards)


def test_a_whole_file_is_taken_before_its_shards() -> None:
    shards = {f"{UNET}.safetensors.index.json", f"{UNET}-00001-of-00001.safetensors"}
    assert folder_files(FOLDER | PLAIN | shards).keys() == FOLDER | PLAIN


def test_bare_component_files_are_a_model_too() -> None:
    bare = {"unet.safetensors", "text_encoder.ckpt", "vae.pt"}
    assert is_folder_model(bare) and set(folder_files(bare | WORDS | RUBBISH)) == bare | WORDS
    with pytest.raises(BadModel, match=r"no vae\.safetensors beside"):
        folder_files((bare | WORDS) - {"vae.pt"})


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (CONFIGS | PLAIN, "no tokenizer/vocab.json and no tokenizer/merges.txt"),
        (FOLDER | PLAIN - {f"{VAE}.safetensors"}, "vae/ has no weights"),
        (FOLDER | PLAIN | {"text_encoder_2/config.json"}, "two text encoders"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_in_a_sentence(names: set[str], sentence: str) -> None:
    with pytest.raises(BadModel, match=sentence):
        folder_files(names)


def test_a_newer_tokenizer_in_one_file_is_enough() -> None:
    assert tokenizer_files({"tokenizer.json", "tokenizer_config.json", "run.py"}) == [
        "tokenizer_config.json", "tokenizer.json",
    ]  # fmt: skip


def test_a_single_checkpoint_is_found_by_itself_and_one_of_several_by_its_name() -> None:
    assert checkpoint_file({"a.ckpt", "a.safetensors", "x/b.ckpt"}) == "a.safetensors"
    assert checkpoint_file({"a.ckpt", "x/b.ckpt"}, "x/b.ckpt") == "x/b.ckpt"
    with pytest.raises(BadModel, match=r"several checkpoints: a\.ckpt, b\.ckpt; choose one with --file"):
        checkpoint_file({"a.ckpt", "b.ckpt"})
    with pytest.raises(BadModel, match=r"no checkpoint 'c\.ckpt' \(there is: a\.ckpt\)"):
        checkpoint_file({"a.ckpt"}, "c.ckpt")


@pytest.mark.parametrize("name", ["../a.ckpt", "/a.ckpt", "x/../../a.ckpt", "x//a.ckpt", "x\\..\\a.ckpt"])
def test_a_name_that_leads_out_of_the_folder_is_never_taken(name: str) -> None:
    with pytest.raises(BadModel):
        checkpoint_file({name}, name)


def test_a_repository_s_folder_is_taken_before_its_checkpoint_unless_that_is_named() -> None:
    names = FOLDER | PLAIN | {"v1-5.ckpt"}
    assert set(model_files(names, variant=None, file=None, tokenizer=True)) == FOLDER | PLAIN
    assert set(model_files(names, variant=None, file="v1-5.ckpt", tokenizer=True)) == WORDS | {"v1-5.ckpt"}
    assert model_files(names, variant=None, file="v1-5.ckpt", tokenizer=False) == ["v1-5.ckpt"]
