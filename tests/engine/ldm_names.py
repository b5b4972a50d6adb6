"""Original (LDM) names for the tensors of a diffusers model: the way back, written apart from `keymaps.py`.

That the names are right, not only the inverse of our own, is held by the reference's converter in test_keymaps.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd_engine.tensorfile import TensorFile

_UNET_FIXED = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(key: str, blocks: int, attention: tuple[bool, ...]) -> str:
    """The original name, prefix and all; `blocks` per level on the way down, `attention` per level, finest first."""
    for ours, theirs in _UNET_FIXED.items():
        if key.startswith(ours + "."):
            return _unet_inner(f"{theirs}.{key.removeprefix(ours + '.')}")
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert match is not None, key
    way, level, kind, i, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"model.diffusion_model.input_blocks.{(level + 1) * (blocks + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        place = 2 if attention[::-1][level] else 1
        return f"model.diffusion_model.output_blocks.{level * (blocks + 1) + blocks}.{place}.{rest}"
    place = 0 if kind == "resnets" else 1
    first = 1 if way == "down" else 0
    way = "input" if way == "down" else "output"
    return _unet_inner(f"{way}_blocks.{first + level * (blocks + 1) + i}.{place}.{rest}")


def _unet_inner(key: str) -> str:
    # The names of a residual block's layers occur nowhere else as the last part but in a transformer's norms.
    for ours, theirs in _UNET_RESNET.items():
        if "transformer_blocks" not in key:
            key = key.replace(f".{ours}.", f".{theirs}.")
    return f"model.diffusion_model.{key}"


def vae_name(key: str, levels: int) -> str:
    """The original name, prefix and all."""
    key = re.sub(r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", key)
    key = re.sub(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", key)
    for level in range(levels):
        key = key.replace(f"up_blocks.{level}.resnets.", f"up.{levels - 1 - level}.block.")
        key = key.replace(f"up_blocks.{level}.upsamplers.0.", f"up.{levels - 1 - level}.upsample.")
    for ours, theirs in _VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    key = key.replace("mid_block.resnets.0.", "mid.block_1.").replace("mid_block.resnets.1.", "mid.block_2.")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return f"first_stage_model.{key}"


def text_name(key: str) -> str:
    """The original name, prefix and all: that of transformers 4."""
    return f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"


_OPEN_CLIP_WIDTH = 1024  # of SD 2.x; SD 1.x has OpenAI's CLIP, 768 wide
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def open_clip(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformers text encoder under OpenCLIP's names: stacked projections, and a last layer that is not used."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in text.items():
        name = key.removeprefix("text_model.")
        for theirs, ours in _OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        if ".q_proj." in key:
            stack = [text[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            tensors[name] = torch.cat(stack)
        elif not re.search(r"\.[kv]_proj\.", key) and "position_ids" not in key:
            tensors[name] = tensor
    last = max(int(name.split(".")[2]) for name in tensors if ".resblocks." in name)
    unused = {
        name.replace(f".{last}.", f".{last + 1}."): tensor for name, tensor in tensors.items() if f"s.{last}." in name
    }
    width = tensors["ln_final.weight"].shape[0]
    projection = tensors["ln_final.weight"].new_zeros(width, width)
    every = tensors | unused | {"text_projection": projection, "logit_scale": projection[0, 0]}
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in every.items()}


def averages(tensors: Mapping[str, Tensor], factor: float = 0.5) -> dict[str, Tensor]:
    """What LDM's training adds: the U-Net's averaged weights (here: scaled ones), their names without dots."""
    unet = {key: tensor for key, tensor in tensors.items() if key.startswith("model.diffusion_model.")}
    averaged = {"model_ema." + key.removeprefix("model.").replace(".", ""): t * factor for key, t in unet.items()}
    return {**averaged, "model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def checkpoint(
    text: Mapping[str, Tensor],
    unet: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
    *,
    blocks: int = 2,
    attention: tuple[bool, ...] = (True, True, True, False),
    levels: int = 4,
    openclip: bool | None = None,
) -> dict[str, Tensor]:
    """One original checkpoint of a diffusers model's state dictionaries; the defaults are SD 1.x's and 2.x's.

    openclip None: a text encoder as wide as SD 2.x's gets OpenCLIP's names.
    """
    if openclip is None:
        widths = (tensor.shape[1] for key, tensor in text.items() if key.endswith("token_embedding.weight"))
        openclip = next(widths) == _OPEN_CLIP_WIDTH
    tensors = open_clip(text) if openclip else {text_name(key): each for key, each in text.items()}
    tensors |= {unet_name(key, blocks, attention): tensor for key, tensor in unet.items()}
    for key, tensor in vae.items():
        name = vae_name(key, levels)
        convolution = ".attn_1." in name and tensor.ndim == 2
        tensors[name] = tensor[:, :, None, None] if convolution else tensor
    return tensors


class MetaFile(TensorFile):
    """A file of tensors that has only shapes."""

    def __init__(self, tensors: Mapping[str, Tensor], **hints: object) -> None:
        self.path, self.keys, self.hints, self.tensors = Path("meta"), tuple(tensors), hints, tensors

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].dtype

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]
