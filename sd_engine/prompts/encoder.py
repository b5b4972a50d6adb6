"""Requests to the contexts that the U-Net attends to.

Legend of the shape suffixes: T text tokens, D width of a token, 1 a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sd_engine.context import Context
from sd_engine.errors import InvalidRequest
from sd_engine.model import Model
from sd_engine.prompts.cache import DEFAULT_CACHE_BYTES, ContextCache
from sd_engine.prompts.chunks import Chunk, Chunker
from sd_engine.request import Request


class _Key(NamedTuple):
    """All that a context of one model depends on; chunks: how many, the empty ones at its end included."""

    text: str
    clip_skip: int
    chunks: int


class PromptEncoder:
    """The contexts of one model's requests, kept for those who come with the same prompts.

    cache_bytes: how much is kept. Raises ValueError below zero.
    """

    def __init__(self, model: Model, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self.model = model
        self.chunker = Chunker(model.tokenizer, model.embeddings)
        self.cache = ContextCache(cache_bytes)

    def contexts(self, request: Request) -> tuple[Context, ...]:
        """One context for each U-Net row of the request: without and with the prompt, or with it alone.

        Those of a guided request have equally many tokens. Raises InvalidRequest for a prompt that is too long, and
        for layers that the text encoder does not have.
        """
        self._check_clip_skip(request.clip_skip)
        sides = [("negative_prompt", request.negative_prompt)] if request.guided else []
        sides.append(("prompt", request.prompt))
        cut = {text: self.chunker.chunks(text, field) for field, text in sides}
        count = max(len(chunks) for chunks in cut.values())
        wanted = [_Key(text, request.clip_skip, count) for _, text in sides]
        made = self._made({key: cut[key.text] for key in wanted})
        return tuple(made[key] for key in wanted)

    def _check_clip_skip(self, clip_skip: int) -> None:
        layers = self.model.text_encoder.config.layers
        if clip_skip > layers:
            allowed = f"1 to {layers}, for {layers} are the layers of the text encoder of {self.model.name}"
            raise InvalidRequest("clip_skip", clip_skip, allowed)

    def _made(self, wanted: dict[_Key, list[Chunk]]) -> dict[_Key, Context]:
        """The contexts, from the cache where it has them; the others go there."""
        contexts = {key: context for key in wanted if (context := self.cache.get(key)) is not None}
        missing = {key: chunks for key, chunks in wanted.items() if key not in contexts}
        if missing:
            contexts |= self._compute(missing)
        for key in missing:
            self.cache.put(key, contexts[key])
        return contexts

    def _compute(self, prompts: dict[_Key, list[Chunk]]) -> dict[_Key, Context]:
        """One prompt at a time, so that no neighbour can change its bits."""
        with self.model.at_work("text_encoder"):
            texts = {
                key: encode(self.model, self._filled(key, chunks), key.clip_skip) for key, chunks in prompts.items()
            }
        with self.model.at_work("unet"):
            return {key: self.model.unet.context(text_TD) for key, text_TD in texts.items()}

    def _filled(self, key: _Key, chunks: Sequence[Chunk]) -> list[Chunk]:
        return [*chunks, *[self.chunker.empty] * (key.chunks - len(chunks))]


def encode(model: Model, chunks: Sequence[Chunk], clip_skip: int = 1) -> Tensor:
    """The encoded prompt [T, D]: its chunks, each encoded by itself, one after the other."""
    with model.at_work("text_encoder"):
        return torch.cat([_encoded(model, chunk, clip_skip) for chunk in chunks])


def _encoded(model: Model, chunk: Chunk, clip_skip: int) -> Tensor:
    words_1TD = model.text_encoder.token_embedding(torch.tensor([chunk.ids], device=model.device)).to(model.dtype)
    for position, vectors in chunk.learned:
        words_1TD[:, position : position + len(vectors)] = vectors
    text_TD = model.text_encoder.encode(words_1TD, clip_skip)[0]
    return text_TD if set(chunk.weights) == {1.0} else emphasized(text_TD, chunk.weights)


def emphasized(text_TD: Tensor, weights: Sequence[float]) -> Tensor:
    """Multiply each token's vector by its weight, and bring the mean of them all back to what it was.

    As A1111's WebUI does, in float32: z' = z w, z'' = z' mean(z) / mean(z').
    """
    plain_TD = text_TD.float()
    weighted_TD = plain_TD * torch.tensor(weights, device=text_TD.device)[:, None]
    before, after = plain_TD.mean(), weighted_TD.mean()
    # Weights can cancel each other out exactly; there is then no mean to bring back.
    return (weighted_TD * torch.where(after == 0, 1.0, before / after)).to(text_TD.dtype)
