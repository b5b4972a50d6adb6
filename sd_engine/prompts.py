"""Encoded prompts, kept: the same negative prompt comes with nearly every job of a night."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from sd_engine.model import Model
from sd_engine.request import Request

# Entries: 77 tokens x 768 x 4 bytes are 237 kB each for Stable Diffusion 1.x at float32, 60 MB in all.
DEFAULT_ENTRIES = 256

Context = Tensor


class PromptEncoder:
    """The contexts of one model's requests; the least recently used makes room for the newest."""

    def __init__(self, model: Model, entries: int = DEFAULT_ENTRIES) -> None:
        self.model = model
        self.entries = entries
        self._contexts: OrderedDict[str, Context] = OrderedDict()

    def contexts(self, request: Request) -> tuple[Context, ...]:
        """One context for each U-Net row of the request: without and with the prompt, or with it alone."""
        prompts = [request.negative_prompt, request.prompt] if request.guided else [request.prompt]
        return tuple(self._context(prompt) for prompt in prompts)

    def _context(self, prompt: str) -> Context:
        """A prompt -> its context [T, D], encoded by itself so that no neighbour can change its bits."""
        if prompt not in self._contexts:
            ids_BT = self.model.tokenizer.encode([prompt]).to(self.model.device)
            with self.model.at_work("text_encoder"):
                self._contexts[prompt] = self.model.text_encoder(ids_BT)[0]
            if len(self._contexts) > self.entries:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(prompt)
        return self._contexts[prompt]


def tokens(context: Context) -> int:
    """How many text tokens the context has."""
    return context.shape[0]


def join(contexts: Sequence[Context]) -> Tensor:
    """The contexts of a pack's U-Net rows, as the U-Net takes them."""
    return torch.stack(list(contexts))
