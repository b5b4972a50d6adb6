"""A prompt to chunks: what the text encoder reads at a time, with a weight for each of its tokens.

Semantics: those of A1111's WebUI, which most published prompts were written for. A chunk holds as many tokens as the
encoder has positions (75 for Stable Diffusion), between a start and an end of its own. Where a chunk is full and a
comma is at most 20 tokens back, what follows the comma moves to the next chunk as a whole. `BREAK` ends a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import Tensor

from sd_engine.errors import InvalidRequest
from sd_engine.prompts.syntax import Fragment, parse
from sd_engine.tokenizer import Tokenizer

MAX_CHARACTERS: Final = 10_000
MAX_CHUNKS: Final = 16
MAX_WEIGHT: Final = 1000.0
_BACK_TO_COMMA: Final = 20  # tokens


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Token ids and their weights, both `max_tokens` long, and the vectors that stand for some: (position, [n, D])."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    learned: tuple[tuple[int, Tensor], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """What stays in one chunk: a token, or the vectors of an embedding, which take a token's place each."""

    ids: tuple[int, ...]
    weight: float
    vectors: Tensor | None = None


class Chunker:
    """Cuts prompts for one tokenizer and its embeddings (a name that stands in a prompt for its vectors [n, D])."""

    def __init__(self, tokenizer: Tokenizer, embeddings: Mapping[str, Tensor]) -> None:
        self.tokenizer = tokenizer
        self.length = tokenizer.max_tokens - 2
        self._embeddings = {name.lower(): vectors for name, vectors in embeddings.items()}

    def chunks(self, prompt: str, field: str) -> list[Chunk]:
        """At least one. Raises InvalidRequest, naming the field, for a prompt beyond the bounds of this module."""
        if len(prompt) > MAX_CHARACTERS:
            allowed = f"at most {MAX_CHARACTERS} characters"
            raise InvalidRequest(field, f"{len(prompt)} characters", allowed, "shorten it")
        parts = [[unit for fragment in part for unit in self._units(fragment, field)] for part in parse(prompt)]
        # A1111's WebUI makes no chunk of nothing after a BREAK, but one of nothing before it.
        filled = [units for part in parts[:-1] for units in self._cut(part)]
        filled += self._cut(parts[-1]) if parts[-1] or not filled else []
        if len(filled) > MAX_CHUNKS:
            allowed = f"at most {MAX_CHUNKS} chunks of {self.length} tokens"
            raise InvalidRequest(field, f"{len(filled)} chunks", allowed, "shorten it, or use BREAK less")
        return [self._chunk(units) for units in filled]

    @cached_property
    def empty(self) -> Chunk:
        """A chunk without words, which the shorter side of guidance is filled up with."""
        return self._chunk([])

    def _units(self, fragment: Fragment, field: str) -> Iterator[_Unit]:
        if not abs(fragment.weight) <= MAX_WEIGHT:
            allowed = f"weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
            raise InvalidRequest(field, f"emphasis of {fragment.weight:g}", allowed, "write brackets as \\( and \\)")
        for words in self._split(fragment.text):
            vectors = self._embeddings.get(words.lower())
            if vectors is None:
                yield from (_Unit((id,), fragment.weight) for id in self.tokenizer.ids(words))
            elif len(vectors) <= self.length:
                yield _Unit((self.tokenizer.pad,) * len(vectors), fragment.weight, vectors)
            else:
                allowed = f"embeddings of at most {self.length} vectors in a prompt"
                raise InvalidRequest(field, f"{words} with {len(vectors)} vectors", allowed, "leave it out")

    def _split(self, text: str) -> list[str]:
        """The names of embeddings, and what is between them."""
        return [text] if self._names is None else self._names.split(text)

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        # The longest first: one name may be the beginning of another.
        names = sorted(self._embeddings, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(_as_word, names))})", re.IGNORECASE) if names else None

    def _cut(self, units: Sequence[_Unit]) -> list[list[_Unit]]:
        chunks: list[list[_Unit]] = [[]]
        used = 0
        for unit in units:
            if used == self.length and unit.ids != (self.tokenizer.comma,):
                chunks.append(_after_comma(chunks[-1], self.tokenizer.comma))
                used = _size(chunks[-1])
            if used + len(unit.ids) > self.length:
                chunks.append([])
                used = 0
            chunks[-1].append(unit)
            used += len(unit.ids)
        return chunks

    def _chunk(self, units: Sequence[_Unit]) -> Chunk:
        tokenizer = self.tokenizer
        filling = self.length - _size(units)
        ids = (tokenizer.start, *(id for unit in units for id in unit.ids), tokenizer.end, *[tokenizer.pad] * filling)
        weights = (1.0, *(unit.weight for unit in units for _ in unit.ids), 1.0, *[1.0] * filling)
        learned, position = [], 1
        for unit in units:
            if unit.vectors is not None:
                learned.append((position, unit.vectors))
            position += len(unit.ids)
        return Chunk(ids, weights, tuple(learned))


def _as_word(name: str) -> str:
    """A pattern for the name where it is not a part of a longer word."""
    before, after = r"(?<!\w)" * name[0].isalnum(), r"(?!\w)" * name[-1].isalnum()
    return before + re.escape(name) + after


def _size(units: Sequence[_Unit]) -> int:
    return sum(len(unit.ids) for unit in units)


def _after_comma(chunk: list[_Unit], comma: int | None) -> list[_Unit]:
    """Take what follows the last comma off a full chunk, if the comma is near enough to its end."""
    back = 0
    for i in range(len(chunk) - 1, -1, -1):
        back += len(chunk[i].ids)
        if back > _BACK_TO_COMMA:
            break
        if chunk[i].ids == (comma,):
            moved = chunk[i + 1 :]
            del chunk[i + 1 :]
            return moved
    return []
