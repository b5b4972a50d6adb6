"""Key maps: how the tensors of a weights file are called there, and here. They are data: rules, read by `KeyMap`.

Two layouts are known. The diffusers folder (diffusers and transformers; old files of theirs too) has one file for each
component. The original checkpoint ("LDM", CompVis and RunwayML) has everything in one file, with blocks counted
through all levels, so that its rules depend on the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from sd_engine.config import UNetConfig, VaeConfig

Rule = tuple[str, str]  # a regular expression, and what stands here in its place


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Rename rules, applied to a key one after the other, and the keys that mean nothing to us."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    # Keys (ours) of linear layers that the file keeps as 1x1 convolutions, [out, in, 1, 1].
    squeezed: tuple[str, ...] = ()

    def rename(self, key: str) -> str | None:
        """Our name of the file's `key`; None: it is to be ignored. An unknown key comes back as it is."""
        if _matches(self.ignored, key):
            return None
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def is_squeezed(self, ours: str) -> bool:
        """Whether the file may have [out, in, 1, 1] where we have [out, in]."""
        return _matches(self.squeezed, ours)


def _matches(patterns: tuple[str, ...], key: str) -> bool:
    return any(re.search(pattern, key) for pattern in patterns)


# Inside a transformer block both layouts have the same names.
_TRANSFORMER: Final[tuple[Rule, ...]] = (
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
    ignored=(r"(^|\.)embeddings\.position_ids$",),
)

DIFFUSERS_UNET: Final = KeyMap(
    rules=(
        *_TRANSFORMER,
        (r"\.downsamplers\.0\.", ".downsample."),
        (r"\.upsamplers\.0\.", ".upsample."),
    )
)

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
    )
)

DIFFUSERS: Final[Mapping[str, KeyMap]] = {"text_encoder": TEXT, "unet": DIFFUSERS_UNET, "vae": DIFFUSERS_VAE}

LDM_PREFIXES: Final[Mapping[str, str]] = {
    "text_encoder": "cond_stage_model.transformer.",
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
}
# What training left in the file: the noise schedule (given by the configuration), the average of the U-Net's
# weights (the plain ones are what the reference draws with), the VAE's critic, CLIP's projections to its image half.
LDM_IGNORED: Final = (
    r"^(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod|log_one_minus_alphas_cumprod)$",
    r"^(posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor)$",
    r"^model_ema\.",
    r"^first_stage_model\.loss\.",
    r"^cond_stage_model\.(transformer\.)?(logit_scale|text_projection(\.weight)?)$",
)


def is_ldm_leftover(key: str) -> bool:
    """Whether a key of an original checkpoint belongs to its training, not to the model."""
    return _matches(LDM_IGNORED, key)


def ldm(unet: UNetConfig, vae: VaeConfig) -> dict[str, KeyMap]:
    """The key map of each component of an original checkpoint, for keys without their prefix."""
    return {"text_encoder": TEXT, "unet": ldm_unet(unet), "vae": ldm_vae(vae)}


_LDM_RESNET: Final[tuple[Rule, ...]] = (
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)


def ldm_unet(config: UNetConfig) -> KeyMap:
    """The original checkpoint's U-Net, without its prefix: `input_blocks`, `middle_block`, `output_blocks`."""
    blocks = ((f"^{re.escape(theirs)}", ours) for theirs, ours in _ldm_unet_blocks(config))
    return KeyMap(rules=(*blocks, *_LDM_RESNET, *_TRANSFORMER))


def _ldm_unet_blocks(config: UNetConfig) -> Iterator[Rule]:
    yield from (("time_embed.0.", "time_embedding.linear_1."), ("time_embed.2.", "time_embedding.linear_2."))
    yield from (("input_blocks.0.0.", "conv_in."), ("out.0.", "conv_norm_out."), ("out.2.", "conv_out."))
    yield from (("middle_block.0.", "mid_block.resnets.0."), ("middle_block.2.", "mid_block.resnets.1."))
    yield "middle_block.1.", "mid_block.attentions.0."
    per_level = config.blocks_per_level + 1  # on the way down the last one is the downsampling, counted too
    for level in range(len(config.channels)):
        for i in range(config.blocks_per_level):
            down = f"input_blocks.{1 + level * per_level + i}."
            yield f"{down}0.", f"down_blocks.{level}.resnets.{i}."
            yield f"{down}1.", f"down_blocks.{level}.attentions.{i}."
        yield f"input_blocks.{(level + 1) * per_level}.0.op.", f"down_blocks.{level}.downsample.conv."
    for level, attention in enumerate(reversed(config.attention)):
        for i in range(per_level):
            up = f"output_blocks.{level * per_level + i}."
            yield f"{up}0.", f"up_blocks.{level}.resnets.{i}."
            # The upsampling stands behind what else is in the last block of its level.
            if attention:
                yield f"{up}1.", f"up_blocks.{level}.attentions.{i}."
            yield f"{up}{2 if attention else 1}.conv.", f"up_blocks.{level}.upsample.conv."


def ldm_vae(config: VaeConfig) -> KeyMap:
    """The original checkpoint's VAE, without its prefix."""
    # Its decoder counts levels from the finest, we count from where the decoder starts.
    last = len(config.channels) - 1
    levels = [(rf"^decoder\.up\.{last - level}\.", f"decoder.levels.{level}.") for level in range(last + 1)]
    attention = [
        (rf"\.mid\.attn_1\.{theirs}\.", f".mid_block.attentions.0.{ours}.")
        for theirs, ours in {
            "norm": "group_norm",
            "q": "attention.to_q",
            "k": "attention.to_k",
            "v": "attention.to_v",
            "proj_out": "attention.to_out",
        }.items()
    ]
    rules = (
        *levels,
        *attention,
        (r"^encoder\.down\.", "encoder.levels."),
        (r"(\.levels\.\d+)\.block\.", r"\1.resnets."),
        (r"(\.levels\.\d+)\.(downsample|upsample)\.", r"\1.resample."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
    return KeyMap(rules, squeezed=(r"\.attention\.to_(q|k|v|out)\.weight$",))
