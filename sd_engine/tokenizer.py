"""Prompts to token ids: a thin wrapper of transformers' CLIP tokenizer, read from a folder's own files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from transformers import CLIPTokenizer

from sd_engine.errors import WeightsError

log = logging.getLogger(__name__)

_FILES = ("vocab.json", "merges.txt")
_WARNED_LIMIT = 1000  # prompts remembered as already warned about: a worker lives for weeks


class Tokenizer:
    """Pads and cuts every prompt to `max_tokens`, as the Stable Diffusion pipelines do."""

    def __init__(self, tokenizer: CLIPTokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._warned: set[str] = set()
        self.max_tokens = max_tokens

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
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for a file that it cannot read
            raise WeightsError(f"tokenizer folder {folder} cannot be read: {error}") from error
        return cls(tokenizer, min(max_tokens, tokenizer.model_max_length))

    @property
    def vocab_size(self) -> int:
        """How many ids there are: one more than the largest."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> ids [B, max_tokens], int64. A prompt that is too long is cut, with one warning in the log."""
        # Half of a surrogate pair, which JSON can carry, has no bytes and would raise; it is drawn as a question mark.
        prompts = [prompt.encode("utf-8", "replace").decode("utf-8") for prompt in prompts]
        batch = self._tokenizer(
            prompts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        for prompt, mask in zip(prompts, batch["attention_mask"], strict=True):
            if bool(mask.all()):
                self._warn_if_cut(prompt)
        ids: Tensor = batch["input_ids"]
        return ids

    def _warn_if_cut(self, prompt: str) -> None:
        dropped = len(self._tokenizer(prompt, verbose=False)["input_ids"]) - self.max_tokens
        if dropped <= 0 or prompt in self._warned:
            return
        if len(self._warned) >= _WARNED_LIMIT:
            self._warned.clear()
        self._warned.add(prompt)
        # Only counts: a prompt is its author's, a log is read by others.
        log.warning(
            "a prompt of %d characters is %d tokens too long for the text encoder's %d; its end is not drawn",
            len(prompt), dropped, self.max_tokens,
        )  # fmt: skip
