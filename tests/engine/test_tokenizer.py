"""Prompts become ids as the reference pipelines make them, whatever is written in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sd_engine.errors import WeightsError
from sd_engine.tokenizer import Tokenizer
from tests.tiny_model import MAX_TOKENS, SPECIALS, vocabulary, write_tokenizer

START, END = (vocabulary()[token] for token in SPECIALS)
PROMPTS = ["a red cat", "", "A  Red\tCAT, isn't it?", "日本の 🎨 picture", "\x00 \u200d é e\u0301", "red " * 100]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json, as in an SD 1.x folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_ids_equal_the_reference_pipelines(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = CLIPTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )["input_ids"]
    assert tokenizer.encode(PROMPTS).tolist() == theirs.tolist()


def test_a_prompt_stands_between_start_and_end_and_is_padded(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["red cat", ""]).tolist()
    words = [vocabulary()["red</w>"], vocabulary()["cat</w>"]]
    assert ids[0] == [START, *words, *[END] * (MAX_TOKENS - 3)]
    assert ids[1] == [START, *[END] * (MAX_TOKENS - 1)]


def test_a_folder_with_only_vocabulary_and_merges_loads(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    bare = Tokenizer.from_folder(tmp_path, max_tokens=MAX_TOKENS)
    assert bare.encode(PROMPTS).tolist() == tokenizer.encode(PROMPTS).tolist()


def test_the_smaller_limit_of_text_encoder_and_folder_wins(folder: Path) -> None:
    assert Tokenizer.from_folder(folder, max_tokens=10).encode(["red " * 20]).shape == (1, 10)
    assert Tokenizer.from_folder(folder, max_tokens=1000).max_tokens == MAX_TOKENS


def test_half_a_surrogate_pair_is_drawn_as_a_question_mark(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["a \ud800 cat"]).tolist() == tokenizer.encode(["a ? cat"]).tolist()


def test_a_word_that_a_small_vocabulary_lacks_becomes_the_unknown_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    words = {token: i for i, token in enumerate([*SPECIALS, "a</w>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    ids = Tokenizer.from_folder(tmp_path).encode(["a é"]).tolist()[0]
    assert ids[:2] == [0, 2] and set(ids[2:]) == {1}


def test_the_ids_of_a_text_are_neither_framed_nor_cut(tokenizer: Tokenizer) -> None:
    red = vocabulary()["red</w>"]
    assert tokenizer.ids("red " * 200) == [red] * 200
    assert tokenizer.ids("") == []


def test_the_special_ids_are_those_of_the_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (START, END, END)
    assert tokenizer.comma == vocabulary()[",</w>"]
    write_tokenizer(tmp_path, pad="!")  # as Stable Diffusion 2.x has it
    second = Tokenizer.from_folder(tmp_path)
    assert (second.end, second.pad) == (END, vocabulary()["!"])
    assert second.encode(["red"]).tolist()[0][-2:] == [vocabulary()["!"]] * 2


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WeightsError, match=f"lacks {name}"):
        Tokenizer.from_folder(tmp_path)


def test_a_broken_file_is_refused_with_its_folder(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{", "utf-8")
    with pytest.raises(WeightsError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)
