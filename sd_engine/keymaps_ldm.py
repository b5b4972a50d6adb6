"""Key maps of the original checkpoint ("LDM": CompVis, RunwayML, Stability): everything in one file.

Blocks are counted through all levels, so that the rules depend on the configuration. SD 1.x has a text encoder with the
names of transformers; SD 2.x has one with the names of OpenCLIP, which stacks the three projections of an attention and
keeps a last layer that SD 2.x does not use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.keymaps import TRANSFORMER, VAE_SQUEEZED, KeyMap, Rule, matches

# What training left in the file: the noise schedule (given by the configuration), the average of the U-Net's
# weights (the plain ones are what the reference draws with), the VAE's critic, CLIP's projections to its image half.
LEFTOVERS: Final = (
    r"^(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_|recip_|recipm1_)?alphas_cumprod|log_one_minus_alphas_cumprod)$",
    r"^(posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|lvlb_weights|logvar|scale_factor)$",
    r"^model_ema\.",
    r"^first_stage_model\.loss\.",
    r"^cond_stage_model\.(transformer\.|model\.)?(logit_scale|text_projection(\.weight)?)$",
    r"^embedding_manager\.",
    # Not of training: how to draw with the model, read by `families.py`.
    r"^(v_pred|ztsnr|global_step)$",
)


def is_leftover(key: str) -> bool:
    """Whether a key of an original checkpoint belongs to its training, not to the model."""
    return matches(LEFTOVERS, key)


_RESNET: Final[tuple[Rule, ...]] = (
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
)


def unet(config: UNetConfig) -> KeyMap:
    """The original checkpoint's U-Net, without its prefix: `input_blocks`, `middle_block`, `output_blocks`."""
    blocks = ((f"^{re.escape(theirs)}", ours) for theirs, ours in _unet_blocks(config))
    return KeyMap(rules=(*blocks, *_RESNET, *TRANSFORMER))


def _unet_blocks(config: UNetConfig) -> Iterator[Rule]:
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


def vae(config: VaeConfig) -> KeyMap:
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
    return KeyMap(rules, ignored=(r"^(loss|model_ema)\.",), squeezed=VAE_SQUEEZED)


def open_clip(config: ClipConfig) -> KeyMap:
    """The text encoder of an original SD 2.x checkpoint, without its prefix.

    Its three projections are stacked (query, key, value), and the layer after the last that SD 2.x draws with is left
    out: it was trained with 24 layers and gives the next to last.
    """
    return KeyMap(
        rules=(
            (r"^positional_embedding$", "position_embedding.weight"),
            (r"^ln_final\.", "final_layer_norm."),
            (r"^transformer\.resblocks\.", "layers."),
            (r"\.ln_(1|2)\.", r".layer_norm\1."),
            (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
            (r"\.mlp\.c_fc\.", ".fc1."),
            (r"\.mlp\.c_proj\.", ".fc2."),
        ),
        ignored=(rf"^transformer\.resblocks\.{config.layers}\.", r"^(text_projection|logit_scale|attn_mask)$"),
        stacked=(
            (
                r"\.attn\.in_proj_(weight|bias)$",
                (r".self_attn.q_proj.\1", r".self_attn.k_proj.\1", r".self_attn.v_proj.\1"),
            ),
        ),
    )


EMA_PREFIX: Final = "model_ema.diffusion_model"


def ema_key(name: str) -> str:
    """The key of the average of a U-Net tensor `name` (without its prefix): the whole name without its dots."""
    return EMA_PREFIX + name.replace(".", "")
