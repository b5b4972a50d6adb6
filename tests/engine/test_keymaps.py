"""Every tensor of SD 1.5 and SD 2.1 has its place here, in both layouts, at full size (on `meta`: names and shapes)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from sd_engine import keymaps, keymaps_ldm
from sd_engine.clip import ClipTextEncoder
from sd_engine.families import SD2, detect
from sd_engine.filling import Part, matched
from sd_engine.keymaps import KeyMap, Place
from sd_engine.model import SD1, Configs
from sd_engine.namings import SINGLE_FILE, recognised
from sd_engine.offload import Component
from sd_engine.unet import UNet
from sd_engine.vae import Vae
from tests.engine import ldm_names
from tests.engine.ldm_names import MetaFile

COMPONENTS: tuple[Component, ...] = ("text_encoder", "unet", "vae")
FAMILIES: dict[str, Configs] = {
    "SD 1.5": SD1,
    "SD 1.5 inpainting": replace(SD1, unet=replace(SD1.unet, in_channels=9)),
    "SD 2.1": SD2,
    "SD 2 inpainting": replace(SD2, unet=replace(SD2.unet, in_channels=9)),
}
# 4 tensors around the layers of the text encoder, 16 in each: 12 layers, or 23.
COUNTS = {"unet": 686, "vae": 248}
TEXT_COUNTS = {768: 196, 1024: 372}


def reference(configs: Configs) -> dict[str, Any]:
    """The reference's modules; `Any` because diffusers is typed so thinly that they seem to be no modules."""
    text, unet = configs.text, configs.unet
    with torch.device("meta"):
        return {
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(hidden_size=text.width, intermediate_size=text.mlp_width,
                               num_hidden_layers=text.layers, num_attention_heads=text.heads)
            ),
            "unet": UNet2DConditionModel(
                in_channels=unet.in_channels, cross_attention_dim=unet.context_width, attention_head_dim=unet.heads,
                block_out_channels=unet.channels, use_linear_projection=unet.linear_projection,
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
            ),
        }  # fmt: skip


def ours(configs: Configs) -> dict[Component, nn.Module]:
    with torch.device("meta"):
        return {"text_encoder": ClipTextEncoder(configs.text), "unet": UNet(configs.unet), "vae": Vae(configs.vae)}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Configs:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def theirs(family: Configs) -> dict[str, Any]:
    return reference(family)


@pytest.fixture(scope="module")
def original(theirs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an original checkpoint, each its own object."""
    return ldm_names.checkpoint(*(theirs[name].state_dict() for name in COMPONENTS))


def count(component: str, family: Configs) -> int:
    return TEXT_COUNTS[family.text.width] if component == "text_encoder" else COUNTS[component]


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_diffusers_names_all_find_their_place(
    component: Component, family: Configs, theirs: dict[str, Any]
) -> None:
    state = theirs[component].state_dict()
    assert len(state) == count(component, family)
    part = Part(component, MetaFile(state), {key: key for key in state}, keymaps.DIFFUSERS[component], "diffusers")
    # Strict: it raises for a key that is missing, unexpected, doubled, or of another shape.
    assert len(matched(ours(family)[component], part)) == count(component, family)


@pytest.mark.parametrize("component", COMPONENTS)
def test_our_names_go_back_to_the_diffusers_names(
    component: Component, family: Configs, theirs: dict[str, Any]
) -> None:
    names = {keymaps.diffusers_name(component, name) for name in ours(family)[component].state_dict()}
    assert {name.removeprefix("text_model.") for name in names} == {
        name.removeprefix("text_model.") for name in theirs[component].state_dict()
    }


def test_the_original_names_all_find_their_place_and_none_is_left_over(
    family: Configs, original: dict[str, Tensor]
) -> None:
    namings = recognised(original, SINGLE_FILE)
    left = {key for key in original if not keymaps_ldm.is_leftover(key)}
    for component, module in ours(family).items():
        naming = namings[component]
        names = {key: key.removeprefix(naming.prefix) for key in left if key.startswith(naming.prefix)}
        left -= names.keys()
        part = Part(component, MetaFile(original), names, naming.keymap(family), naming.name)
        assert len(matched(module, part)) == count(component, family)
    assert left == set()


def test_the_family_is_told_by_the_shapes(family: Configs, original: dict[str, Tensor]) -> None:
    found = detect(MetaFile(original), recognised(original, SINGLE_FILE)["unet"])
    assert (found.text, found.vae) == (family.text, family.vae)
    assert replace(found.unet, sample_size=0) == replace(family.unet, sample_size=0)


@pytest.mark.parametrize("name", ["SD 1.5", "SD 2.1"])
def test_original_names_mean_what_the_reference_converter_takes_them_for(name: str) -> None:
    """Each tensor comes to the same place by our map alone, and by the reference's converter and our other map."""
    configs = FAMILIES[name]
    modules = reference(configs)
    original = ldm_names.checkpoint(*(modules[name].state_dict() for name in COMPONENTS))
    converted: dict[Component, dict[str, Tensor]] = {
        "unet": convert_ldm_unet_checkpoint(dict(original), dict(reference_unet_config())),
        "vae": convert_ldm_vae_checkpoint(dict(original), {"down_block_types": [0] * 4, "up_block_types": [0] * 4}),
    }
    if configs is SD1:
        converted["text_encoder"] = convert_ldm_clip_checkpoint(dict(original))
    for component, tensors in converted.items():
        naming = recognised(original, SINGLE_FILE)[component]
        keymap = naming.keymap(configs)
        own = {key: tensor for key, tensor in original.items() if key.startswith(naming.prefix)}
        direct = {id(tensor): keymap.rename(key.removeprefix(naming.prefix)) for key, tensor in own.items()}
        around = {id(tensor): keymaps.DIFFUSERS[component].rename(key) for key, tensor in tensors.items()}
        # The converter makes new tensors where it squeezes a convolution; those are compared by name.
        same = direct.keys() & around.keys()
        assert all(direct[i] == around[i] for i in same)
        assert len(around) == count(component, configs) and len(same) >= count(component, configs) - 8
        assert set(direct.values()) == set(around.values())


def test_open_clips_stacked_projections_are_cut_as_the_reference_cuts_them() -> None:
    """By value, at a small width: query, key and value have the same shapes, so that names and shapes tell nothing."""
    configs = replace(SD2.text, vocab_size=100, width=8, mlp_width=16, layers=2, heads=2)
    torch.manual_seed(0)
    shapes = CLIPTextConfig(vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
                            num_attention_heads=2)  # fmt: skip
    original = ldm_names.open_clip({key: torch.randn(t.shape) for key, t in CLIPTextModel(shapes).state_dict().items()})
    del original["cond_stage_model.model.text_projection"]  # it would set the width that the reference cuts at
    used = {key: tensor for key, tensor in original.items() if ".resblocks.2." not in key}
    wanted = convert_open_clip_checkpoint(CLIPTextModel(shapes), used)
    keymap = keymaps_ldm.open_clip(configs)
    found = {}
    for key, tensor in original.items():
        for place in keymap.places(key.removeprefix("cond_stage_model.model.")):
            found[place.ours] = tensor.chunk(place.parts)[place.part]
    expected = {keymaps.TEXT.rename(key): tensor for key, tensor in wanted.items()}
    assert found.keys() == expected.keys() and len(found) == 4 + 2 * 16
    assert all(torch.equal(found[key or ""], tensor) for key, tensor in expected.items())


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
    assert keymaps_ldm.is_leftover(key)


@pytest.mark.parametrize(
    "key", ["model.diffusion_model.out.0.bias", "first_stage_model.quant_conv.bias", "betas2", "lora"]
)
def test_nothing_else_is_ignored(key: str) -> None:
    assert not keymaps_ldm.is_leftover(key)


def test_an_unknown_name_comes_back_as_it_is_so_that_the_loader_can_refuse_it() -> None:
    assert KeyMap(rules=((r"^a\.", "b."),)).rename("c.weight") == "c.weight"


def test_a_stacked_tensor_has_several_places() -> None:
    keymap = KeyMap(rules=((r"^a\.", "b."),), stacked=((r"both$", ("one", "two")),))
    assert keymap.places("a.both") == (Place("b.one", 0, 2), Place("b.two", 1, 2))
    assert keymap.places("a.single") == (Place("b.single"),)


def test_the_name_of_an_average_has_no_dots() -> None:
    assert keymaps_ldm.ema_key("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"
