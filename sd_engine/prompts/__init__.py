"""Prompts: their language, their chunks, learned words, and the contexts that the U-Net attends to."""

from sd_engine.context import Context, join, tokens
from sd_engine.prompts.cache import DEFAULT_CACHE_BYTES
from sd_engine.prompts.encoder import PromptEncoder

__all__ = ["DEFAULT_CACHE_BYTES", "Context", "PromptEncoder", "join", "tokens"]
