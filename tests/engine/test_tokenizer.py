"""Prompts become ids as the reference pipelines make them, whatever is written in them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from sd_engine.errors import WeightsError
from sd_engine.tokenizer import Tokenizer
from tests.tiny_model import MAX_TOKENS, SPECIALS, vocabulary, write_tokenizer

START, END = (vocabulary()[token] for token in SPECIALS)
TRICKY = [
    "<|endoftext|>", "a <|startoftext|> red", "red!cat !", "A<cat-toy> <CAT-TOY>red", "tintin Tintin TINTIN",
    "[BREAK] red[break]", "  !  ", "<|ENDOFTEXT|>", "<|STARTOFTEXT|>", "<cat-toy>   red",
]  # fmt: skip
PIECES = [
    *TRICKY, "red", " ", "cat", "é", "e\u0301", "Å", "İ", "ß", "½", "'s", "'LL", "\uff112", "\u3000", "\n", "🎨",
    "\x00", "_", "\u200d", "日本", "!!", ",", "...",
]  # fmt: skip
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


def _plain(folder: Path) -> None:
    """As it is written: special tokens as texts, no `tokenizer.json`."""


def _published(folder: Path) -> None:
    """SD 1.x's own files: special tokens with how they are found, after the text was normalized."""
    tokens = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "unk_token": SPECIALS[1]}
    found = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    whole = {role: {"content": token, **found} for role, token in tokens.items()}
    config = {role: {"__type": "AddedToken", **token} for role, token in whole.items()}
    limit = {"model_max_length": MAX_TOKENS, "pad_token": SPECIALS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | limit), "utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(whole | {"pad_token": SPECIALS[1]}), "utf-8")


def _second(folder: Path) -> None:
    """Stable Diffusion 2.x: padded with an exclamation mark, which thereby is a special token."""
    write_tokenizer(folder, pad="!")


def _saved(folder: Path) -> None:
    """As transformers saves it today: `tokenizer.json`, and the vocabulary in there alone."""
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def _taught(folder: Path) -> None:
    """Words added, plain and special, and saved with it."""
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens(["<cat-toy>", "Tintin"])
    theirs.add_tokens(["[BREAK]"], special_tokens=True)
    theirs.save_pretrained(folder)


def _taught_before(folder: Path) -> None:
    """Words added in a folder from before `tokenizer.json`."""
    size = len(vocabulary())
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": size, "Tintin": size + 1}), "utf-8")


def _decoded(folder: Path) -> None:
    """The form between: added tokens in `tokenizer_config.json`."""
    found = {"lstrip": False, "rstrip": True, "single_word": False, "special": True, "normalized": False}
    tokens = {START: SPECIALS[0], END: SPECIALS[1], len(vocabulary()): "<cat-toy>"}
    added = {str(index): {"content": token, **found} for index, token in tokens.items()}
    config = {"added_tokens_decoder": added, "bos_token": SPECIALS[0], "eos_token": SPECIALS[1], "model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize("form", [_plain, _published, _second, _saved, _taught, _taught_before, _decoded])
def test_every_form_of_folder_gives_the_reference_s_ids(tmp_path: Path, form: Callable[[Path], None]) -> None:
    write_tokenizer(tmp_path)
    form(tmp_path)
    ours, theirs = Tokenizer.from_folder(tmp_path), CLIPTokenizer.from_pretrained(tmp_path)
    for text in [*PROMPTS, *TRICKY, *_babble(300)]:
        assert ours.ids(text) == theirs(text, add_special_tokens=False, verbose=False)["input_ids"], repr(text)
    assert (ours.start, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert ours.max_tokens == min(theirs.model_max_length, 77)


def _babble(texts: int) -> Iterator[str]:
    """Pieces that are cut, joined and normalized in odd ways, strung together by chance."""
    chance = random.Random(0)
    for _ in range(texts):
        yield "".join(chance.choice(PIECES) for _ in range(chance.randint(1, 8)))


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
