"""Whose names a file of weights has: which component it holds, after which library, or what it is instead.

A component is known by one key that no other kind of file has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from sd_engine import keymaps, keymaps_ldm
from sd_engine.keymaps import KeyMap
from sd_engine.model import Configs
from sd_engine.offload import Component

WORDS: Final[dict[Component, str]] = {"text_encoder": "text encoder", "unet": "U-Net", "vae": "VAE"}


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of one component in one kind of file. `probe` is the key, without `prefix`, that it is known by."""

    component: Component
    name: str
    prefix: str
    probe: str
    keymap: Callable[[Configs], KeyMap]


def _ldm_unet(prefix: str) -> Naming:
    return Naming("unet", "LDM", prefix, "input_blocks.0.0.weight", lambda configs: keymaps_ldm.unet(configs.unet))


def _ldm_vae(prefix: str) -> Naming:
    return Naming("vae", "LDM", prefix, "encoder.down.0.block.0.conv1.weight", lambda c: keymaps_ldm.vae(c.vae))


def _clip(name: str, prefix: str) -> tuple[Naming, Naming]:
    probe = "embeddings.token_embedding.weight"
    return (
        Naming("text_encoder", name, prefix, f"text_model.{probe}", lambda _: keymaps.TEXT),
        Naming("text_encoder", name, prefix, probe, lambda _: keymaps.TEXT),
    )


def _open_clip(prefix: str) -> Naming:
    probe = "transformer.resblocks.0.attn.in_proj_weight"
    return Naming("text_encoder", "OpenCLIP", prefix, probe, lambda configs: keymaps_ldm.open_clip(configs.text))


# In the original single file every component has a prefix.
SINGLE_FILE: Final = (
    _ldm_unet("model.diffusion_model."),
    *_clip("transformers", "cond_stage_model.transformer."),
    _open_clip("cond_stage_model.model."),
    _ldm_vae("first_stage_model."),
)
# A file of one component may have kept its prefix, or have the names of the diffusers folder.
COMPONENT_FILE: Final = (
    *SINGLE_FILE,
    _ldm_unet(""),
    Naming("unet", "diffusers", "", "conv_in.weight", lambda _: keymaps.DIFFUSERS_UNET),
    *_clip("transformers", ""),
    _open_clip(""),
    _ldm_vae(""),
    Naming("vae", "diffusers", "", "encoder.down_blocks.0.resnets.0.conv1.weight", lambda _: keymaps.DIFFUSERS_VAE),
)


def recognised(keys: Iterable[str], namings: tuple[Naming, ...]) -> dict[Component, Naming]:
    """The components whose probe is among the keys, each with the naming that it was found by."""
    there = set(keys)
    found: dict[Component, Naming] = {}
    for naming in namings:
        if naming.prefix + naming.probe in there:
            found.setdefault(naming.component, naming)
    return found


@dataclass(frozen=True, slots=True)
class Stranger:
    """A kind of file that is no Stable Diffusion model: what it is called, and what its owner can do."""

    pattern: str
    said: str
    remedy: str

    @property
    def kind(self) -> str:
        """What it is called, without its article."""
        return self.said.partition(" ")[2]


_OTHER_FAMILY: Final = "this engine draws with Stable Diffusion 1.x and 2.x: take a model of these"
_STRANGERS: Final = (
    Stranger(
        r"^lora_(unet|te)|\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.hada_w1_a$|\.lokr_w1",
        "a LoRA", "it changes a model and is none itself: load the model that it was made for",
    ),
    Stranger(
        r"^control_model\.|^controlnet_cond_embedding\.|(^|\.)(input_hint_block|zero_convs)\.",
        "a ControlNet", "it guides a model and is none itself: load the model that it was made for",
    ),
    Stranger(r"^conditioner\.embedders\.|^add_embedding\.linear_1\.", "an SDXL model", _OTHER_FAMILY),
    Stranger(r"(^|\.)(joint_blocks|double_blocks|single_blocks|transformer_blocks\.0\.norm1_context)\.",
             "a diffusion transformer (SD 3 or Flux)", _OTHER_FAMILY),
    Stranger(r"^depth_model\.", "a depth-to-image model (SD 2 depth)", "take a model that draws from text alone"),
    Stranger(r"motion_modules\.", "a motion module", "it moves a model and is none itself: load an ordinary model"),
    Stranger(
        r"^(string_to_param|string_to_token|emb_params|clip_[lg])$",
        "a textual inversion embedding", "put it into the folder embeddings/ of the model that it was made for",
    ),
)  # fmt: skip


def stranger(keys: Iterable[str]) -> Stranger | None:
    """What the file is, if some key shows that it is no Stable Diffusion model."""
    keys = tuple(keys)
    return next((kind for kind in _STRANGERS if any(re.search(kind.pattern, key) for key in keys)), None)
