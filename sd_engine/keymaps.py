"""Key maps: how the tensors of a weights file are called there, and here. They are data: rules, read by `KeyMap`.

Here are the names of the diffusers folder (diffusers and transformers; old files of theirs too), in both directions.
Those of the original checkpoint are in `keymaps_ldm.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

Rule = tuple[str, str]  # a regular expression, and what stands here in its place


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter of ours, and which part of a file's tensor it is: the `part`-th of `parts` equal ones."""

    ours: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Rename rules, applied to a key one after the other, and the keys that mean nothing to us."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    # Keys (ours) of linear layers that the file keeps as 1x1 convolutions, [out, in, 1, 1].
    squeezed: tuple[str, ...] = ()
    # Keys (the file's) whose tensor is several of ours, stacked along its first dimension in equal parts.
    stacked: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def rename(self, key: str) -> str | None:
        """Our name of the file's `key`; None: it is to be ignored. An unknown key comes back as it is."""
        if matches(self.ignored, key):
            return None
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def places(self, key: str) -> tuple[Place, ...]:
        """Where the tensor of the file's `key` belongs: one place, several for a stacked one, none for an ignored."""
        for pattern, replacements in self.stacked:
            if re.search(pattern, key):
                names = (self.rename(re.sub(pattern, replacement, key)) for replacement in replacements)
                return tuple(Place(name, i, len(replacements)) for i, name in enumerate(names) if name is not None)
        ours = self.rename(key)
        return () if ours is None else (Place(ours),)

    def is_squeezed(self, ours: str) -> bool:
        """Whether the file may have [out, in, 1, 1] where we have [out, in]."""
        return matches(self.squeezed, ours)


def matches(patterns: tuple[str, ...], key: str) -> bool:
    """Whether one of the regular expressions is found in `key`."""
    return any(re.search(pattern, key) for pattern in patterns)


# Inside a transformer block both layouts have the same names.
TRANSFORMER: Final[tuple[Rule, ...]] = (
    (r"\.transformer_blocks\.0\.", ".block."),
    (r"\.ff\.net\.0\.proj\.", ".ff.proj_in."),
    (r"\.ff\.net\.2\.", ".ff.proj_out."),
    (r"\.to_out\.0\.", ".to_out."),
)

# The original checkpoint holds a transformers text encoder. `text_model.` is written by transformers 4, and by 5 in
# some classes; the position ids were a stored buffer before transformers 4.31.
TEXT: Final = KeyMap(
    rules=(
        (r"^(text_model\.)?embeddings\.", ""),
        (r"^(text_model\.)?encoder\.layers\.", "layers."),
        (r"^(text_model\.)?final_layer_norm\.", "final_layer_norm."),
        (r"^(layers\.\d+)\.mlp\.", r"\1."),
    ),
    ignored=(r"(^|\.)embeddings\.position_ids$", r"^(logit_scale|text_projection(\.weight)?)$"),
)

DIFFUSERS_UNET: Final = KeyMap(
    rules=(
        *TRANSFORMER,
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
    )
)

# Its attention was made of 1x1 convolutions, and some conversions kept their shape.
VAE_SQUEEZED: Final = (r"\.attention\.to_(q|k|v|out)\.weight$",)
_VAE_ATTENTION: Final = r"(mid_block\.attentions\.0)\."
DIFFUSERS_VAE: Final = KeyMap(
    rules=(
        (r"^encoder\.down_blocks\.", "encoder.levels."),
        (r"^decoder\.up_blocks\.", "decoder.levels."),
        (r"\.(downsamplers|upsamplers)\.0\.", ".resample."),
        # Before diffusers 0.17 the attention's layers were called query, key, value, proj_attn.
        (_VAE_ATTENTION + r"(?:to_q|query)\.", r"\1.attention.to_q."),
        (_VAE_ATTENTION + r"(?:to_k|key)\.", r"\1.attention.to_k."),
        (_VAE_ATTENTION + r"(?:to_v|value)\.", r"\1.attention.to_v."),
        (_VAE_ATTENTION + r"(?:to_out\.0|proj_attn)\.", r"\1.attention.to_out."),
    ),
    squeezed=VAE_SQUEEZED,
)

# Of an AutoencoderTiny; its encoder is not used.
TINY_DECODER: Final = KeyMap(rules=((r"^decoder\.", ""),), ignored=(r"^encoder\.",))

DIFFUSERS: Final[Mapping[str, KeyMap]] = {
    "text_encoder": TEXT,
    "unet": DIFFUSERS_UNET,
    "vae": DIFFUSERS_VAE,
    "tiny_decoder": TINY_DECODER,
}

# Our names to the folder's: the way back. `diffusers_name` holds the two directions against each other.
_TO_DIFFUSERS: Final[Mapping[str, tuple[Rule, ...]]] = {
    "text_encoder": (
        (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
        (r"^layers\.", "text_model.encoder.layers."),
        (r"^final_layer_norm\.", "text_model.final_layer_norm."),
        (r"\.(fc[12])\.", r".mlp.\1."),
    ),
    "unet": (
        (r"\.block\.", ".transformer_blocks.0."),
        (r"\.ff\.proj_in\.", ".ff.net.0.proj."),
        (r"\.ff\.proj_out\.", ".ff.net.2."),
        (r"\.to_out\.", ".to_out.0."),
        (r"\.downsample\.", ".downsamplers.0."),
        (r"\.upsample\.", ".upsamplers.0."),
    ),
    "vae": (
        (r"^(encoder\.levels\.\d+)\.resample\.", r"\1.downsamplers.0."),
        (r"^(decoder\.levels\.\d+)\.resample\.", r"\1.upsamplers.0."),
        (r"^encoder\.levels\.", "encoder.down_blocks."),
        (r"^decoder\.levels\.", "decoder.up_blocks."),
        (r"\.attention\.to_out\.", ".to_out.0."),
        (r"\.attention\.", "."),
    ),
    "tiny_decoder": ((r"^", "decoder."),),
}


def diffusers_name(component: str, ours: str) -> str:
    """The name that the folder layout has for our parameter. Raises ValueError if it would not come back."""
    theirs = ours
    for pattern, replacement in _TO_DIFFUSERS[component]:
        theirs = re.sub(pattern, replacement, theirs)
    if DIFFUSERS[component].rename(theirs) != ours:
        raise ValueError(f"{component} parameter {ours!r} would be written as {theirs!r}, and not be found again")
    return theirs
