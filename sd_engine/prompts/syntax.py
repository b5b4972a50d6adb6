r"""The language of prompts: emphasis, escapes and BREAK, as A1111's WebUI reads them.

    (a)  [a]  (a:1.3)            weights 1.1, 1 / 1.1 and 1.3; nested ones multiply
    \(  \)  \[  \]  \\           the character itself; a backslash before anything else is dropped
    a BREAK b                    b starts a new chunk

A closing bracket that closes nothing stands for itself, and one that is never closed reaches to the end of the text.
One difference: BREAK also breaks inside brackets, where the WebUI reads it as a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final, NamedTuple

# Weights that round and square brackets without a number give.
_LEVEL: Final = {"(": 1.1, "[": 1 / 1.1}
_OPENS: Final = {")": "(", "]": "["}

# Possessive (++): a text made to match almost must not cost more than its length.
_PIECE: Final = re.compile(
    r"""
      \\ (?P<escaped> [()\[\]\\]? )
    | (?P<opening> [(\[] )
    | : \s*+ (?P<weight> [+-]? (?: [0-9]++ (?: \. [0-9]*+ )? | \. [0-9]++ ) ) \s*+ \)
    | (?P<closing> [)\]] )
    | (?P<words> [^\\()\[\]:]++ | : )
    """,
    re.VERBOSE,
)
_BREAK: Final = re.compile(r"\bBREAK\b")


class Fragment(NamedTuple):
    """A stretch of a prompt whose words have one weight; 1 is no emphasis."""

    text: str
    weight: float


def parse(text: str) -> list[list[Fragment]]:
    """Read a prompt: the parts that BREAK separates (one, where there is none), each as its fragments in order.

    Neighbours of equal weight are one fragment, so a text without emphasis is a single one, and an empty text none.
    Never raises.
    """
    reader = _Reader()
    for match in _PIECE.finditer(text):
        reader.read(match)
    return reader.finish()


@dataclass(slots=True)
class _Reader:
    """What was read so far: texts (None is a BREAK), their weights, and how many there were at each open bracket."""

    texts: list[str | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    opened: dict[str, list[int]] = field(default_factory=lambda: {bracket: [] for bracket in _LEVEL})

    def read(self, match: re.Match[str]) -> None:
        """Take in one piece of the text."""
        kind = match.lastgroup
        if kind == "escaped":
            self._add(match[kind])
        elif kind == "opening":
            self.opened[match[kind]].append(len(self.texts))
        elif kind == "weight" and self.opened["("]:
            self._multiply(self.opened["("].pop(), float(match[kind]))
        elif kind == "closing" and self.opened[_OPENS[match[kind]]]:
            bracket = _OPENS[match[kind]]
            self._multiply(self.opened[bracket].pop(), _LEVEL[bracket])
        else:
            self._add_words(match[0])

    def finish(self) -> list[list[Fragment]]:
        """Close what is still open, and join neighbours of equal weight."""
        for bracket, starts in self.opened.items():
            for start in starts:
                self._multiply(start, _LEVEL[bracket])
        parts: list[list[Fragment]] = [[]]
        for text, weight in zip(self.texts, self.weights, strict=True):
            if text is None:
                parts.append([])
            elif parts[-1] and parts[-1][-1].weight == weight:
                parts[-1][-1] = Fragment(parts[-1][-1].text + text, weight)
            elif text:
                parts[-1].append(Fragment(text, weight))
        return parts

    def _add(self, text: str | None) -> None:
        self.texts.append(text)
        self.weights.append(1.0)

    def _add_words(self, text: str) -> None:
        first, *others = _BREAK.split(text)
        self._add(first.rstrip() if others else first)
        for i, words in enumerate(others, 1):
            self._add(None)
            self._add(words.strip() if i < len(others) else words.lstrip())

    def _multiply(self, start: int, factor: float) -> None:
        for i in range(start, len(self.weights)):
            self.weights[i] *= factor
