"""Prompts are cut into chunks as A1111's WebUI cuts them. The rules are written down again here, by hand, in tokens."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_engine.errors import InvalidRequest
from sd_engine.prompts.chunks import MAX_CHARACTERS, Chunk, Chunker
from sd_engine.tokenizer import Tokenizer
from tests.tiny_model import SPECIALS, vocabulary, write_tokenizer

START, END = (vocabulary()[token] for token in SPECIALS)
RED, CAT, COMMA, BANG = (vocabulary()[token] for token in ("red</w>", "cat</w>", ",</w>", "!"))
CAT_TOY = torch.arange(96, dtype=torch.float32).reshape(3, 32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def chunker(tokenizer: Tokenizer) -> Chunker:
    return Chunker(tokenizer, {"<cat-toy>": CAT_TOY, "<cat-toy>2": CAT_TOY[:1], "badArt": CAT_TOY[:2]})


def words(chunk: Chunk) -> list[int]:
    """The ids between start and end; what comes after is checked to be padding alone."""
    assert chunk.ids[0] == START and len(chunk.ids) == len(chunk.weights) == 77
    end = chunk.ids.index(END)
    assert set(chunk.ids[end:]) == {END}
    return list(chunk.ids[1:end])


def cut(chunker: Chunker, prompt: str) -> list[list[int]]:
    return [words(chunk) for chunk in chunker.chunks(prompt, "prompt")]


@pytest.mark.parametrize(
    ("count", "sizes"), [(0, [0]), (1, [1]), (74, [74]), (75, [75]), (76, [75, 1]), (150, [75, 75]), (151, [75, 75, 1])]
)
def test_a_chunk_holds_75_tokens(chunker: Chunker, count: int, sizes: list[int]) -> None:
    assert cut(chunker, "red " * count) == [[RED] * size for size in sizes]


def test_a_short_prompt_has_the_ids_of_the_tokenizer(chunker: Chunker, tokenizer: Tokenizer) -> None:
    for prompt in ("a red cat", "", "A  Red\tCAT, isn't it?", "日本の 🎨 picture"):
        (chunk,) = chunker.chunks(prompt, "prompt")
        assert list(chunk.ids) == tokenizer.encode([prompt]).tolist()[0]
        assert set(chunk.weights) == {1.0}


def test_a_chunk_is_padded_as_the_tokenizer_pads(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, pad="!")  # Stable Diffusion 2.x: the end stands once
    chunker = Chunker(Tokenizer.from_folder(tmp_path), {})
    first, second = chunker.chunks("red " * 76, "prompt")
    assert list(first.ids) == [START, *[RED] * 75, END]
    assert list(second.ids) == [START, RED, END, *[BANG] * 74]
    assert list(chunker.empty.ids) == [START, END, *[BANG] * 75]


@pytest.mark.parametrize(
    ("before", "after", "sizes"),
    [
        (60, 15, [61, 15]),  # the comma is the 15th token from the end of the full chunk: what follows it moves
        (55, 20, [56, 20]),  # the 20th
        (54, 21, [75, 1]),  # the 21st: too far, the words are parted
        (74, 10, [75, 10]),  # the comma itself is the last of the chunk
        (75, 10, [75, 11]),  # the comma is the first token that has no room
        (40, 34, [75]),  # nothing is moved while there is room
    ],
)
def test_words_after_a_near_comma_move_to_the_next_chunk_together(
    chunker: Chunker, before: int, after: int, sizes: list[int]
) -> None:
    prompt = "red " * before + ", " + "cat " * after
    ids = [RED] * before + [COMMA] + [CAT] * after
    chunks = cut(chunker, prompt)
    assert [len(chunk) for chunk in chunks] == sizes
    assert list(chain(*chunks)) == ids


def test_a_comma_counts_in_its_own_chunk_only(chunker: Chunker) -> None:
    chunks = cut(chunker, "red " * 60 + ", " + "cat " * 100)
    assert [len(chunk) for chunk in chunks] == [61, 75, 25]


def test_break_ends_a_chunk(chunker: Chunker) -> None:
    assert cut(chunker, "red BREAK cat cat") == [[RED], [CAT, CAT]]
    assert cut(chunker, "red BREAK") == [[RED]]
    assert cut(chunker, "BREAK red") == [[], [RED]]
    assert cut(chunker, "BREAK") == [[]]
    assert cut(chunker, "red BREAK BREAK cat") == [[RED], [], [CAT]]
    assert cut(chunker, "red " * 76 + "BREAK cat") == [[RED] * 75, [RED], [CAT]]


def test_each_token_has_the_weight_of_its_fragment(chunker: Chunker) -> None:
    first, second = chunker.chunks("red (cat cat:1.5) " + "red " * 73 + "(cat:0.5)", "prompt")
    assert list(first.weights) == [1, 1, 1.5, 1.5, *[1] * 72, 1]
    assert list(second.weights) == [1, 1, 0.5, *[1] * 74]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "cat", "at", ",", "é", "(red:1.2)", "[cat]"]), max_size=400))
def test_no_token_is_lost_and_none_changes_its_place(chunker: Chunker, tokenizer: Tokenizer, parts: list[str]) -> None:
    prompt = " ".join(parts)
    plain = " ".join(part.strip("()[]").removesuffix(":1.2") for part in parts)
    assert list(chain(*cut(chunker, prompt))) == tokenizer.ids(plain)


@pytest.mark.parametrize(
    ("prompt", "ids", "learned"),
    [
        ("red <cat-toy> cat", [RED, END, END, END, CAT], [(2, 3)]),
        ("<cat-toy>, red", [END, END, END, COMMA, RED], [(1, 3)]),  # beside a comma, without a space
        ("<CAT-toy>2", [END], [(1, 1)]),  # the longest name that fits, in any case
        ("badart red", [END, END, RED], [(1, 2)]),
        ("red badart<cat-toy>", [RED, *[END] * 5], [(2, 2), (4, 3)]),
    ],
)
def test_a_learned_word_takes_a_place_for_each_of_its_vectors(
    chunker: Chunker, prompt: str, ids: list[int], learned: list[tuple[int, int]]
) -> None:
    (chunk,) = chunker.chunks(prompt, "prompt")
    assert list(chunk.ids[1 : 1 + len(ids)]) == ids
    assert [(position, len(vectors)) for position, vectors in chunk.learned] == learned
    assert all(torch.equal(vectors, CAT_TOY[: len(vectors)]) for _, vectors in chunk.learned)


@pytest.mark.parametrize("prompt", ["badarts", "a badart_", "1badart", "cat-toy"])
def test_a_part_of_a_longer_word_is_no_learned_word(chunker: Chunker, tokenizer: Tokenizer, prompt: str) -> None:
    (chunk,) = chunker.chunks(prompt, "prompt")
    assert chunk.learned == ()
    assert words(chunk) == tokenizer.ids(prompt)


def test_a_letter_that_only_looks_the_same_without_case_is_read_as_text(tokenizer: Tokenizer) -> None:
    chunker = Chunker(tokenizer, {"mask": CAT_TOY})
    (chunk,) = chunker.chunks("ma\u017fk", "prompt")  # the long s is an s to a search that ignores case
    assert chunk.learned == () and words(chunk) == tokenizer.ids("ma\u017fk")


def test_a_learned_word_is_weighted_and_never_parted(chunker: Chunker) -> None:
    first, second = chunker.chunks("red " * 73 + "(<cat-toy>:1.3)", "prompt")
    assert words(first) == [RED] * 73
    assert second.learned[0][0] == 1
    assert list(second.weights[:5]) == [1, 1.3, 1.3, 1.3, 1]
    # And it moves as a whole with what follows a comma.
    first, second = chunker.chunks("red " * 69 + ", <cat-toy> cat cat cat", "prompt")
    assert words(first) == [*[RED] * 69, COMMA] and first.learned == ()
    assert [position for position, _ in second.learned] == [1]
    assert list(second.ids[4:7]) == [CAT] * 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a" * (MAX_CHARACTERS + 1), "negative_prompt='10001 characters' is not allowed: at most 10000 characters"),
        ("red " * 1201, "negative_prompt='17 chunks' is not allowed: at most 16 chunks of 75 tokens; shorten it"),
        ("BREAK " * 16 + "a", "negative_prompt='17 chunks'"),
        ("(" * 100 + "a", "negative_prompt='emphasis of 13780.6' is not allowed: weights from -1000 to 1000"),
        (f"(a:{'9' * 400})", "negative_prompt='emphasis of inf'"),
        ("(a:0)(b:-1001)", "emphasis of -1001"),
    ],
)
def test_a_prompt_beyond_the_bounds_is_refused_in_a_sentence(chunker: Chunker, prompt: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chunker.chunks(prompt, "negative_prompt")
    assert message in str(refused.value)


def test_a_learned_word_that_no_chunk_can_hold_is_refused(tokenizer: Tokenizer) -> None:
    chunker = Chunker(tokenizer, {"long": torch.zeros(76, 32), "fits": torch.zeros(75, 32)})
    assert len(chunker.chunks("red fits red", "prompt")) == 3
    with pytest.raises(InvalidRequest, match="'long with 76 vectors' is not allowed: embeddings of at most 75 vectors"):
        chunker.chunks("a long one", "prompt")
