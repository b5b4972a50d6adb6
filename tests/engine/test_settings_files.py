"""Whatever stands in a folder's configurations: it is read, or one sentence names the file and the setting."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sd_engine.checkpoint import Choice, opened_checkpoint
from sd_engine.errors import WeightsError
from sd_engine.weights import load_model
from tests.engine.models import refusal

TEXT, UNET, VAE, NOISE = (
    "text_encoder/config.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"
)  # fmt: skip
NUMBERS = {
    TEXT: (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings", "layer_norm_eps",
    ),
    UNET: (
        "in_channels", "out_channels", "block_out_channels", "attention_head_dim", "layers_per_block",
        "cross_attention_dim", "norm_num_groups", "sample_size",
    ),
    VAE: (
        "in_channels", "latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "scaling_factor",
    ),
    NOISE: ("num_train_timesteps", "beta_start", "beta_end", "steps_offset"),
}  # fmt: skip
NO_NUMBERS: tuple[Any, ...] = (None, "x", -1, float("nan"), [], {}, [-1, -2], ["x"], 10**12)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "tiny")


def write(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **settings}), "utf-8")


@pytest.mark.parametrize(("file", "key"), [(file, key) for file, keys in NUMBERS.items() for key in keys])
def test_what_is_no_number_for_a_setting_is_told_before_anything_is_built(folder: Path, file: str, key: str) -> None:
    """10^12 of anything would take minutes or all memory to build; that it is told at once shows that nothing is."""
    for value in NO_NUMBERS:
        if (key, value) in (("layer_norm_eps", 10**12), ("scaling_factor", 10**12)):
            continue  # odd, but a number that can be computed with
        if (key, value) == ("sample_size", None):
            continue  # the reference's own default, written out: the usual size is meant
        write(folder / file, **{key: value})
        with pytest.raises(WeightsError) as caught, opened_checkpoint(folder, Choice()):
            pass
        message = str(caught.value)
        assert message.startswith(str(folder / file)) and "\n" not in message, message


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        (UNET, {"norm_num_groups": 7}, "32 channels cannot have 7 equal groups"),
        (UNET, {"attention_head_dim": 5}, "32 channels cannot have 5 equal heads"),
        (UNET, {"attention_head_dim": [2, 2, 2]}, "do not have the same length"),
        (VAE, {"norm_num_groups": 5}, "16 channels cannot have 5 equal groups"),
        (TEXT, {"num_attention_heads": 3}, "32 channels cannot have 3 equal heads"),
        (TEXT, {"num_hidden_layers": 10**6}, "whole numbers from 1 to 200"),
    ],
)
def test_numbers_that_do_not_go_together_are_told(folder: Path, file: str, settings: dict[str, Any], said: str) -> None:
    write(folder / file, **settings)
    message = refusal(folder)
    assert message.startswith(str(folder / file)) and said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("resnet_out_scale_factor", 2.0), ("resnet_skip_time_act", True), ("mid_block_only_cross_attention", True),
        ("time_embedding_act_fn", "silu"), ("timestep_post_act", "silu"),
    ],
)  # fmt: skip
def test_a_setting_that_changes_the_network_but_no_shape_is_refused(folder: Path, key: str, value: object) -> None:
    """No tensor would tell: the pictures would only be wrong."""
    write(folder / UNET, **{key: value})
    assert f"{key}={value!r} is not supported" in refusal(folder)


@pytest.mark.parametrize(("file", "key"), [(TEXT, "hidden_act"), (VAE, "act_fn"), (UNET, "act_fn")])
def test_a_setting_that_is_left_out_has_the_reference_s_default(folder: Path, file: str, key: str) -> None:
    settings = json.loads((folder / file).read_text("utf-8"))
    del settings[key]
    (folder / file).write_text(json.dumps(settings), "utf-8")
    assert load_model(folder).text_encoder.config.activation == "quick_gelu"


def test_parts_of_two_models_are_told_with_their_folder(folder: Path) -> None:
    write(folder / UNET, cross_attention_dim=64)
    assert refusal(folder).startswith(f"{folder}: the U-Net takes texts of width 64, the text encoder gives 32; take")
