"""Every tensor of SD 1.5 has its place here, in both layouts, at full size (on `meta`: names and shapes only)."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor, nn

from sd_engine import keymaps
from sd_engine.clip import ClipTextEncoder
from sd_engine.config import ClipConfig, UNetConfig, VaeConfig
from sd_engine.keymaps import KeyMap
from sd_engine.unet import UNet
from sd_engine.vae import Vae
from tests.engine import ldm_names, reference

COUNTS = {"text_encoder": 196, "unet": 686, "vae": 248}


@pytest.fixture(scope="module")
def theirs() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "text_encoder": reference.sd15_text_encoder(),
            "unet": reference.sd15_unet(),
            "vae": reference.sd15_vae(),
        }


@pytest.fixture(scope="module")
def ours() -> dict[str, nn.Module]:
    with torch.device("meta"):
        return {
            "text_encoder": ClipTextEncoder(ClipConfig()),
            "unet": UNet(UNetConfig()),
            "vae": Vae(VaeConfig()),
        }


@pytest.fixture(scope="module")
def original(theirs: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of an original SD 1.5 checkpoint, each its own object."""
    text, unet, vae = (theirs[name].state_dict() for name in ("text_encoder", "unet", "vae"))
    return ldm_names.checkpoint(text, unet, vae)


def shapes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors}


@pytest.mark.parametrize("component", COUNTS)
def test_the_diffusers_names_of_sd15_all_find_their_place(
    component: str, theirs: dict[str, nn.Module], ours: dict[str, nn.Module]
) -> None:
    state = theirs[component].state_dict()
    keymap = keymaps.DIFFUSERS[component]
    assert len(state) == COUNTS[component]
    renamed = shapes((keymap.rename(key) or "", tensor) for key, tensor in state.items())
    assert renamed == shapes(ours[component].state_dict().items())


@pytest.mark.parametrize("component", COUNTS)
def test_the_original_names_of_sd15_all_find_their_place(
    component: str, original: dict[str, Tensor], ours: dict[str, nn.Module]
) -> None:
    prefix, keymap = keymaps.LDM_PREFIXES[component], keymaps.ldm(UNetConfig(), VaeConfig())[component]
    own = {key.removeprefix(prefix): tensor for key, tensor in original.items() if key.startswith(prefix)}
    assert len(own) == COUNTS[component]
    renamed = {keymap.rename(key) or "": tuple(tensor.shape) for key, tensor in own.items()}
    renamed = {key: shape[:2] if keymap.is_squeezed(key) else shape for key, shape in renamed.items()}
    assert renamed == shapes(ours[component].state_dict().items())


def test_original_names_mean_what_the_reference_converter_takes_them_for(original: dict[str, Tensor]) -> None:
    """Each tensor comes to the same place by our map alone, and by the reference's converter and our other map."""
    maps = keymaps.ldm(UNetConfig(), VaeConfig())
    converted = {
        "unet": convert_ldm_unet_checkpoint(dict(original), dict(reference_unet_config())),
        "vae": convert_ldm_vae_checkpoint(dict(original), {"down_block_types": [0] * 4, "up_block_types": [0] * 4}),
        "text_encoder": convert_ldm_clip_checkpoint(dict(original)),
    }
    for component, prefix in keymaps.LDM_PREFIXES.items():
        direct = {
            id(original[key]): maps[component].rename(key.removeprefix(prefix)) for key in original if prefix in key
        }
        around = {id(tensor): keymaps.DIFFUSERS[component].rename(key) for key, tensor in converted[component].items()}
        # The converter makes new tensors where it squeezes a convolution; those are compared by name.
        same = direct.keys() & around.keys()
        assert {direct[i] for i in same} == {around[i] for i in same}
        assert all(direct[i] == around[i] for i in same)
        assert len(around) == COUNTS[component] and len(same) >= COUNTS[component] - 8
        assert set(direct.values()) == set(around.values())


def reference_unet_config() -> dict[str, object]:
    names = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    return {
        "down_block_types": names,
        "up_block_types": up,
        "layers_per_block": 2,
        "class_embed_type": None,
        "addition_embed_type": None,
    }


@pytest.mark.parametrize("old", ["query", "key", "value", "proj_attn"])
def test_the_vae_attention_names_of_old_files_are_known(old: str) -> None:
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[old]
    rename = keymaps.DIFFUSERS["vae"].rename
    for half in ("encoder", "decoder"):
        before = f"{half}.mid_block.attentions.0."
        assert rename(f"{before}{old}.weight") == rename(f"{before}{new}.weight")


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_text_encoder_is_known_with_and_without_its_prefix(prefix: str) -> None:
    assert keymaps.TEXT.rename(f"{prefix}embeddings.token_embedding.weight") == "token_embedding.weight"
    assert keymaps.TEXT.rename(f"{prefix}encoder.layers.11.mlp.fc1.bias") == "layers.11.fc1.bias"
    assert keymaps.TEXT.rename(f"{prefix}embeddings.position_ids") is None


@pytest.mark.parametrize(
    "key",
    ["betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef2", "model_ema.decay",
     "cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight",
     "first_stage_model.loss.logvar"],
)  # fmt: skip
def test_what_training_left_in_an_original_checkpoint_is_ignored(key: str) -> None:
    assert keymaps.is_ldm_leftover(key)


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.out.0.bias", "first_stage_model.quant_conv.bias", "betas2", "lora"]
)
def test_nothing_else_is_ignored(key: str) -> None:
    assert not keymaps.is_ldm_leftover(key)


def test_an_unknown_name_comes_back_as_it_is_so_that_the_loader_can_refuse_it() -> None:
    assert KeyMap(rules=((r"^a\.", "b."),)).rename("c.weight") == "c.weight"
