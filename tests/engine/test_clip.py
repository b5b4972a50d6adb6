"""The text encoder gives what transformers' gives with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sd_engine.clip import ClipTextEncoder
from sd_engine.config import ClipConfig
from sd_engine.keymaps import TEXT
from tests.engine.reference import difference, pour
from tests.tiny_model import randomize

# float32 keeps 7 digits; two layers of sums over at most 128 numbers, in another order, lose about one of them.
TOLERANCE = 1e-5


def pair(activation: str, heads: int, layers: int = 2) -> tuple[Any, ClipTextEncoder]:
    """The reference and ours, with the same random weights."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=99, hidden_size=48, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=77, hidden_act=activation, bos_token_id=97, eos_token_id=98, pad_token_id=98,
    )  # fmt: skip
    reference: Any = CLIPTextModel(config)
    reference.eval()
    randomize(reference, 1)
    with torch.device("meta"):
        ours = ClipTextEncoder(ClipConfig.from_dict(config.to_dict()))
    return reference, pour(reference, ours, TEXT)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_the_text_encoder_equals_the_reference(activation: str, heads: int) -> None:
    reference, ours = pair(activation, heads)
    ids = torch.randint(0, 97, (3, 77), generator=torch.Generator().manual_seed(2))
    assert difference(ours(ids), reference(ids).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize("clip_skip", [1, 2, 4, 5])
@torch.no_grad()
def test_an_earlier_layer_is_the_references_hidden_state_and_the_final_norm(clip_skip: int) -> None:
    reference, ours = pair("quick_gelu", 4, layers=5)
    ids = torch.randint(0, 97, (3, 77), generator=torch.Generator().manual_seed(2))
    hidden = reference(ids, output_hidden_states=True).hidden_states[-clip_skip]
    assert difference(ours(ids, clip_skip), reference.final_layer_norm(hidden)) < TOLERANCE


@torch.no_grad()
def test_a_token_does_not_see_those_after_it() -> None:
    _, ours = pair("quick_gelu", 4)
    ids = torch.randint(0, 97, (1, 77), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 40:] = 5
    before, after = ours(ids), ours(changed)
    # The same kernel on the same shape: positions before the change see the very same numbers.
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])
