"""A pickled checkpoint that is dangerous, damaged or odd is told in one sentence, and nothing of it is ever run."""

from __future__ import annotations

import mmap
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_engine import layouts, picklefile
from sd_engine.errors import WeightsError
from sd_engine.weights import load_model
from tests.engine.models import VAE, configs_of, original_tensors, refusal
from tests.tiny_model import make_tiny_model

TENSORS = {"a": torch.ones(3), "b": torch.zeros(2, 2)}


class Program:
    """A pickle that would make a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def save_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def save_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [save_zip, save_old, save_plain])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_with_code_is_refused_and_the_code_is_not_run(
    tmp_path: Path, save: Callable[[Any, Path], None], suffix: str
) -> None:
    path, canary = tmp_path / f"model{suffix}", tmp_path / "canary"
    save({"state_dict": {} if save is save_plain else TENSORS, "more": Program(canary)}, path)
    message = refusal(path)
    assert "asks for posix.mkdir" in message and "take its .safetensors file" in message
    assert not canary.exists()
    pickle.loads(pickle.dumps(Program(canary)))  # noqa: S301 - our own, to see that it would have worked
    assert canary.exists(), "the program does nothing, so that its refusal would show nothing"


def test_a_component_with_code_is_refused_too(tiny_folder: Path, tmp_path: Path) -> None:
    folder, canary = shutil.copytree(tiny_folder, tmp_path / "tiny"), tmp_path / "canary"
    (folder / f"{VAE}.safetensors").unlink()
    torch.save({"decoder": Program(canary)}, folder / f"{VAE}.bin")
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.bin is refused"):
        load_model(folder)
    assert not canary.exists()


def test_a_pickle_of_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    assert "asks for torch.nn.modules.linear.Linear" in refusal(tmp_path / "module.pt")


def test_a_pickle_of_something_else_than_names_and_tensors_is_told(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    assert "holds a list, not tensors by name" in refusal(tmp_path / "list.ckpt")


def test_a_zip_that_would_be_unpacked_is_refused_before_it_is(tmp_path: Path) -> None:
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 2**20)
    assert path.stat().st_size < 4096
    assert "compresses archive/data.pkl" in refusal(path)


@pytest.mark.parametrize("save", [save_zip, save_old])
@pytest.mark.parametrize("kept", [1, 20, 0.3, 0.7, 0.99])
def test_a_torn_pickle_is_told(tmp_path: Path, save: Callable[[Any, Path], None], kept: float) -> None:
    save({"state_dict": {"a": torch.ones(4000)}}, tmp_path / "whole.ckpt")
    content = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "torn.ckpt").write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    assert re.search("not a whole checkpoint", refusal(tmp_path / "torn.ckpt"))


def save_safetensors(content: Any, path: Path) -> None:
    save_file(content, path)


@pytest.mark.parametrize(
    ("save", "suffix"), [(save_zip, ".ckpt"), (save_old, ".ckpt"), (save_safetensors, ".safetensors")]
)
def test_a_file_with_damaged_bytes_opens_or_is_told_and_nothing_else_happens(
    tmp_path: Path, save: Callable[[Any, Path], None], suffix: str
) -> None:
    save(TENSORS, tmp_path / f"whole{suffix}")
    whole, rng, told = (tmp_path / f"whole{suffix}").read_bytes(), random.Random(8), 0
    for i in range(150):
        damaged, path = bytearray(whole), tmp_path / f"{i}{suffix}"
        for _ in range(rng.choice((1, 2, 5))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            with layouts.opened(path) as file:
                assert all(isinstance(file.shape(key), tuple) for key in file.keys)
        except WeightsError as error:
            told += 1
            assert "\n" not in str(error) and path.name in str(error)
    assert told > 10, "the damage shows nothing"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_is_refused_without_torchs_advice_to_run_it(tmp_path: Path, protocol: int) -> None:
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    path.write_bytes(pickle.dumps({"a": Program(canary)}, protocol))
    message = refusal(path)
    assert "take its .safetensors file" in message and "weights_only" not in message
    assert not canary.exists()


def test_a_checkpoint_that_holds_itself_is_told(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.ones(3)}
    content["state_dict"] = content
    torch.save(content, tmp_path / "endless.ckpt")
    assert "no Stable Diffusion checkpoint: 1 unexpected: a" in refusal(tmp_path / "endless.ckpt")


@pytest.mark.parametrize("odd", [torch.ones(3).to_sparse(), torch.ones(3, device="meta")], ids=["sparse", "left out"])
def test_numbers_that_are_not_one_after_the_other_are_told(tmp_path: Path, odd: Tensor) -> None:
    torch.save({"state_dict": {**TENSORS, "odd": odd}}, tmp_path / "odd.ckpt")
    assert "sparse, quantized or left out): 1 tensors: odd" in refusal(tmp_path / "odd.ckpt")


def test_a_pickle_larger_than_any_model_s_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_zip(TENSORS, tmp_path / "large.ckpt")
    monkeypatch.setattr(picklefile, "PICKLE_LIMIT", 100)
    assert "has large/data.pkl of more than 100 bytes" in refusal(tmp_path / "large.ckpt")


def test_what_is_read_as_a_whole_stays_in_memory_until_all_of_it_is_taken(tmp_path: Path) -> None:
    """A stacked projection is three of ours. Unlike a mapped one, it could not be read again for the second."""
    folder = make_tiny_model(tmp_path / "sd2", sd2=True)
    plain = load_model(folder)
    tensors = original_tensors(folder, openclip=True)
    stacked = max(tensor.nbytes for key, tensor in tensors.items() if key.endswith("in_proj_weight"))
    assert stacked >= 2 * mmap.PAGESIZE, "it has no whole page that could be lost"
    models = []
    for save in (save_zip, save_old):
        save({"state_dict": tensors}, tmp_path / "model.ckpt")
        path, words = tmp_path / "model.ckpt", folder / "tokenizer"
        models.append(load_model(path, dtype="bf16", tokenizer=words, configs=configs_of(plain)))
    parts = [model.text_encoder.state_dict() for model in models]
    assert all(torch.equal(tensor, parts[1][key]) for key, tensor in parts[0].items())
