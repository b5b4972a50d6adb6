"""Prompts are read as A1111's WebUI reads them, and a text without emphasis is not touched."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sd_engine.prompts.syntax import Fragment, parse

# Texts, and texts made of little but what the language gives a meaning.
TEXTS = st.one_of(st.text(), st.text(alphabet="()[]\\:.0123456789+- abBREAK,\n"))


def fragments(prompt: str) -> list[tuple[str, float]]:
    """Of a prompt without BREAK, with weights to twelve places: how they were multiplied together is no promise."""
    (part,) = parse(prompt)
    return [(text, round(weight, 12)) for text, weight in part]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("normal text", [("normal text", 1)]),
        ("an (important) word", [("an ", 1), ("important", 1.1), (" word", 1)]),
        ("an [unimportant] word", [("an ", 1), ("unimportant", round(1 / 1.1, 12)), (" word", 1)]),
        ("a (word:1.3)", [("a ", 1), ("word", 1.3)]),
        ("a (word : 1.3 )", [("a ", 1), ("word ", 1.3)]),
        ("a (word:.5) (word:2.) (word:+2) (word:-1)",
         [("a ", 1), ("word", 0.5), (" ", 1), ("word", 2), (" ", 1), ("word", 2), (" ", 1), ("word", -1)]),
        ("((a)) [[b]]", [("a", 1.21), (" ", 1), ("b", round(1 / 1.21, 12))]),
        ("(a [b] c)", [("a ", 1.1), ("b", 1), (" c", 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),  # neighbours of equal weight are one stretch
        ("(a:1.0) b", [("a b", 1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1), ("house", 1.573), (" ", 1.1), ("on", 1), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
             ("sky", 1.4641), (".", 1.1)],
        ),
    ],
)  # fmt: skip
def test_emphasis_gives_the_weights_of_the_webui(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert fragments(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (r"\(literal\]", [("(literal]", 1)]),
        (r"a \(b\) \[c\] \\", [("a (b) [c] \\", 1)]),
        (r"(\(a\):1.5)", [("(a)", 1.5)]),
        (r"(a\)", [("a)", 1.1)]),
        ("a\\b\\", [("ab", 1)]),  # before anything else, a backslash is dropped
        (r"\\(a)", [("\\", 1), ("a", 1.1)]),
    ],
)
def test_an_escaped_character_stands_for_itself(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert fragments(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", round(1 / 1.1, 12)), ("c", 1)]),
        ("a) b] c", [("a) b] c", 1)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        ("[a:1.3)", [("a:1.3)", round(1 / 1.1, 12))]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("a: b", [("a: b", 1)]),
        ("()", []),
    ],
)
def test_what_is_not_balanced_or_no_number_stands_for_itself(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert fragments(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [["a"], ["b"]]),
        ("a, BREAK,b", [["a,"], [",b"]]),
        ("BREAK a", [[], ["a"]]),
        ("a BREAK", [["a"], []]),
        ("a BREAK BREAK b", [["a"], [], ["b"]]),
        ("a\nBREAK\nb", [["a"], ["b"]]),
        ("(a BREAK b)", [["a"], ["b"]]),
        ("BREAKFAST, a break, Break, unBREAK, BREAK_", [["BREAKFAST, a break, Break, unBREAK, BREAK_"]]),
    ],
)
def test_break_parts_a_prompt_where_it_is_a_word_of_its_own(prompt: str, expected: list[list[str]]) -> None:
    assert [[text for text, _ in part] for part in parse(prompt)] == expected


def test_emphasis_reaches_over_a_break() -> None:
    assert parse("(a BREAK b:2) c") == [[Fragment("a", 2)], [Fragment("b", 2), Fragment(" c", 1)]]


@given(TEXTS)
@example("\\")
@example("(:1)")
@example("(a:٣)")  # digits of other scripts are no weight
@example("\ud800(")
def test_any_text_is_read(prompt: str) -> None:
    for part in parse(prompt):
        assert all(text for text, _ in part)
        assert all(a.weight != b.weight for a, b in pairwise(part))


@given(st.text().filter(lambda text: not set(text) & set("()[]\\") and "BREAK" not in text))
@example("a: b, 1:2")
@example("  spaces\tand\nlines ")
def test_a_text_without_the_language_is_not_touched(prompt: str) -> None:
    assert parse(prompt) == [[Fragment(prompt, 1.0)] if prompt else []]


@given(st.text())
def test_an_escaped_text_is_the_text(prompt: str) -> None:
    escaped = "".join("\\" + character if character in "()[]\\" else character for character in prompt)
    parts = parse(escaped)
    if "BREAK" not in prompt:
        assert parts == [[Fragment(prompt, 1.0)] if prompt else []]


@pytest.mark.parametrize("piece", ["(", "(a", "[(", ":", ": ", "(a:1", "1", "BREAK", "\\", "a(b:1.1", ") "])
def test_a_text_made_to_be_slow_is_read(piece: str) -> None:
    parse(piece * (10_000 // len(piece)))  # a search that tries again from every character would end by the timeout
