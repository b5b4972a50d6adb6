"""Text to token ids: a thin wrapper of the tokenizers library, over CLIP's vocabulary in a folder's own files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Words
from torch import Tensor

from sd_engine.errors import WeightsError
from sd_engine.tokenizer_files import Settings, read_settings, read_words

_FILES = ("vocab.json", "merges.txt")
_COMMA = ",</w>"
_LEAST_TOKENS = 3  # a word between start and end


class Tokenizer:
    """Text to token ids, and the special ids that stand around them.

    max_tokens: what the text encoder takes at a time, with start and end.
    start, end, pad: the ids before and after the words of a text, and of what fills it up to `max_tokens`.
    comma: the id of a comma that ends a word; None for a vocabulary without it.
    """

    def __init__(self, words: Words, settings: Settings, max_tokens: int) -> None:
        self._words = words
        self.max_tokens = max_tokens
        self.start, self.end, self.pad = (_id(words, each) for each in (settings.start, settings.end, settings.pad))
        self.comma: int | None = words.token_to_id(_COMMA)

    @classmethod
    def from_folder(cls, folder: Path, *, max_tokens: int = 77) -> Tokenizer:
        """Read `vocab.json` and `merges.txt` (and the `*.json` beside them). Never asks the network.

        `max_tokens` is what the text encoder has positions for; the folder's own smaller limit wins.
        Raises WeightsError for a missing or unreadable file.
        """
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing and not (folder / "tokenizer.json").is_file():
            raise WeightsError(
                f"tokenizer folder {folder} lacks {', '.join(missing)}; copy them from the model's source"
            )
        try:
            settings = read_settings(folder)
            words = read_words(folder, settings)
        except Exception as error:  # the tokenizers library raises bare Exception for a file that it cannot read
            raise WeightsError(f"tokenizer folder {folder} cannot be read: {' '.join(str(error).split())}") from error
        limit = settings.limit
        if not isinstance(limit, int | float) or not limit >= _LEAST_TOKENS:
            raise WeightsError(
                f"tokenizer folder {folder}: model_max_length={limit!r} is not allowed: a number from {_LEAST_TOKENS} "
                "on; copy tokenizer_config.json from the model's source"
            )
        return cls(words, settings, int(min(max_tokens, limit)))

    @property
    def vocab_size(self) -> int:
        """How many ids there are: one more than the largest."""
        return max(self._words.get_vocab().values()) + 1

    def ids(self, text: str) -> list[int]:
        """The ids of a text's words, without start and end, however many they are."""
        # Half of a surrogate pair, which JSON can carry, has no bytes and would raise; it is drawn as a question mark.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self._words.encode(text, add_special_tokens=False).ids

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ids [B, max_tokens], int64: each between start and end, padded, or cut where it is too long.

        For training, whose captions are short; `prompts` encodes what is drawn, and cuts nothing.
        """
        return torch.tensor([self._framed(self.ids(text)[: self.max_tokens - 2]) for text in texts])

    def _framed(self, ids: list[int]) -> list[int]:
        return [self.start, *ids, self.end] + [self.pad] * (self.max_tokens - 2 - len(ids))


def _id(words: Words, token: AddedToken) -> int:
    id = words.token_to_id(token.content)
    assert id is not None, "what the vocabulary lacked was added to it"
    return id
