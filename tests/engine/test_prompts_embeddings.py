"""Words that users taught are read from both forms of their files, and drawn as by the reference."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sd_engine import Model, Request, WeightsError, load_model
from sd_engine.prompts import PromptEncoder
from sd_engine.prompts.chunks import Chunker
from sd_engine.prompts.embeddings import load_embeddings
from sd_engine.prompts.encoder import encode
from tests.engine.reference import difference

WIDTH = 32
ONE = torch.randn((1, WIDTH), generator=torch.Generator().manual_seed(1))
THREE = torch.randn((3, WIDTH), generator=torch.Generator().manual_seed(2))


def webui(vectors: Any) -> dict[str, Any]:
    """A pickle of A1111's WebUI, with what it writes beside the vectors."""
    about = {"string_to_token": {"*": 265}, "name": "x", "step": 99, "sd_checkpoint": None}
    return {**about, "string_to_param": {"*": vectors}}


def first_trainers(vectors: Tensor) -> dict[str, Any]:
    """A pickle of the method's first implementation, as PyTorch before 1.12 wrote it: the module with the vectors."""
    module = nn.ParameterDict({"*": nn.Parameter(vectors)})
    del module.__dict__["_keys"]
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": module}


def test_both_forms_are_read(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    torch.save(webui(THREE), tmp_path / "bad-hands.pt")
    torch.save(webui(nn.Parameter(ONE.half())), tmp_path / "half.pt")
    torch.save(first_trainers(THREE), tmp_path / "first.PT")
    save_file({"emb_params": THREE}, tmp_path / "below" / "Easy.safetensors")
    torch.save(OrderedDict({"<cat-toy>": ONE[0]}), tmp_path / "learned_embeds.bin")
    save_file({"<dog-toy>": THREE}, tmp_path / "learned_embeds.safetensors")
    (tmp_path / "README.md").write_text("nothing to read")
    found = load_embeddings(tmp_path, WIDTH)
    expected = {"bad-hands": THREE, "half": ONE.half().float(), "first": THREE, "Easy": THREE, "<cat-toy>": ONE,
                "<dog-toy>": THREE}  # fmt: skip
    assert found.keys() == expected.keys()
    for word, vectors in expected.items():
        assert found[word].dtype == torch.float32 and not found[word].requires_grad
        assert torch.equal(found[word], vectors)


class Canary:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    torch.save({**webui(ONE), "extra": Canary(canary)}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match=r"evil\.pt is refused: beside tensors its pickle asks for"):
        load_embeddings(tmp_path, WIDTH)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (webui(torch.zeros(2, 768)), "vectors of width 768, the model's text encoder takes 32"),
        ({"<a>": torch.zeros(0, WIDTH)}, "vectors of width 32"),
        (webui(torch.zeros(1, 2, WIDTH)), "holds no vectors of numbers"),
        (webui(torch.zeros(2, WIDTH, dtype=torch.int64)), "holds no vectors of numbers"),
        (webui("a string"), "holds no vectors of numbers"),
        (webui(ONE.to("meta")), "holds no vectors of numbers"),
        (webui(torch.full((1, WIDTH), float("nan"))), "numbers that are not finite"),
        ({"clip_g": torch.zeros(1, 1280), "clip_l": torch.zeros(1, 768)}, r"but 2 entries (clip_g, clip_l)"),
        ({"string_to_param": {}}, "holds no embedding"),
        ({}, "but dict"),
        (torch.zeros(2, WIDTH), "but Tensor"),
        ({" ": ONE}, "a word without letters"),
    ],
)
def test_what_is_no_embedding_of_this_model_is_one_sentence(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=re.escape(message)) as refused:
        load_embeddings(tmp_path, WIDTH)
    assert str(tmp_path / "a.pt") in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"\x80\x02torn"])
def test_a_torn_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / name))):
        load_embeddings(tmp_path, WIDTH)


def test_two_files_with_one_word_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    torch.save(webui(ONE), tmp_path / "toy.pt")
    save_file({"Toy": ONE}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(WeightsError, match=r"toy\.pt and .*learned_embeds\.safetensors both teach the word 'toy'"):
        load_embeddings(tmp_path, WIDTH)
    with pytest.raises(WeightsError, match="there is no folder"):
        load_embeddings(tmp_path / "none", WIDTH)


@pytest.fixture(scope="module")
def taught(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("embeddings")
    save_file({"<one>": ONE}, folder / "one.safetensors")
    torch.save(webui(THREE), folder / "<three>.pt")
    return replace(load_model(tiny_folder), embeddings=load_embeddings(folder, WIDTH))


def encoded(model: Model, prompt: str) -> Tensor:
    return encode(model, Chunker(model.tokenizer, model.embeddings).chunks(prompt, "prompt"))


@pytest.mark.parametrize("prompt", ["<one>", "a red <one> at", "a <three>, red <one>", "<three> cat <three>"])
@torch.no_grad()
def test_a_learned_word_is_encoded_as_by_the_reference(tiny_folder: Path, taught: Model, prompt: str) -> None:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipeline.load_textual_inversion({"<one>": ONE[0]})
    pipeline.load_textual_inversion(webui(THREE), token="<three>")
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    # float32 keeps 7 digits; two layers of sums, in another order, lose one of them.
    assert difference(encoded(taught, prompt), theirs[0]) < 1e-5


def test_a_learned_word_reaches_the_contexts_and_its_weight_counts(taught: Model) -> None:
    encoder = PromptEncoder(taught)

    def keys(prompt: str) -> Tensor:
        return encoder.contexts(Request(prompt, guidance=None))[0].layers[0]

    assert keys("a <one> at").shape == keys("a red at").shape
    assert not torch.equal(keys("a <one> at"), keys("a red at"))
    assert not torch.equal(keys("a (<one>:1.5) at"), keys("a <one> at"))
    assert torch.equal(keys("a (<one>:1.0) at"), keys("a <one> at"))
