"""Encoded prompts, kept: the same negative prompt comes with nearly every job of a night."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from sd_engine.weights import Model

# Entries: 77 tokens x 768 x 4 bytes are 237 kB each for Stable Diffusion 1.x at float32, 60 MB in all.
DEFAULT_ENTRIES = 256


class PromptCache:
    """The encodings of one model; the least recently used makes room for the newest."""

    def __init__(self, model: Model, entries: int = DEFAULT_ENTRIES) -> None:
        self.model = model
        self.entries = entries
        self._contexts: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompt: str) -> Tensor:
        """A prompt -> its context [T, D], encoded by itself so that no neighbour can change its bits."""
        if prompt not in self._contexts:
            ids_BT = self.model.tokenizer.encode([prompt]).to(self.model.device)
            self._contexts[prompt] = self.model.text_encoder(ids_BT)[0]
            if len(self._contexts) > self.entries:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(prompt)
        return self._contexts[prompt]
