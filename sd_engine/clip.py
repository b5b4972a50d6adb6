"""The CLIP text encoder of Stable Diffusion.

Legend of the shape suffixes: B prompts, T tokens, D width.
Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision"; parameter names
follow the transformers layout but for the renames in `keymaps.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.config import ClipConfig
from sd_engine.layers import Linear


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = (
            proj(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class ClipLayer(nn.Module):
    """Attention and a two-layer perceptron, each after its LayerNorm and around a skip."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = CausalAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.self_attn(self.layer_norm1(x_BTD))
        return x_BTD + self.fc2(self.activation(self.fc1(self.layer_norm2(x_BTD))))


class ClipTextEncoder(nn.Module):
    """Token ids to the context that the U-Net attends to."""

    def __init__(self, config: ClipConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_tokens, config.width)
        self.layers = nn.ModuleList(ClipLayer(config) for _ in range(config.layers))
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, ids_BT: Tensor, clip_skip: int = 1) -> Tensor:
        """Token ids [B, T], T at most `max_tokens` -> context [B, T, D]."""
        return self.encode(self.token_embedding(ids_BT), clip_skip)

    def encode(self, words_BTD: Tensor, clip_skip: int = 1) -> Tensor:
        """The vectors of tokens [B, T, D] -> context [B, T, D].

        clip_skip: which layer is taken, counted from the last (1); the final norm follows whichever it is.
        """
        dtype = self.final_layer_norm.weight.dtype  # of activations: large weights may rest in a narrower one
        x_BTD = words_BTD.to(dtype) + self.position_embedding.weight[: words_BTD.shape[1]].to(dtype)
        for layer in self.layers[: len(self.layers) + 1 - clip_skip]:
            x_BTD = layer(x_BTD)
        return self.final_layer_norm(x_BTD)
