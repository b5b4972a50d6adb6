"""Encoded prompts are the reference pipeline's, and what is kept or shared changes no bit of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sd_engine import Engine, InvalidRequest, Model, Request, load_model
from sd_engine.context import Context, PackContext
from sd_engine.prompts import PromptEncoder, join, tokens
from sd_engine.prompts.cache import ContextCache
from sd_engine.prompts.chunks import Chunker
from sd_engine.prompts.encoder import emphasized, encode
from tests.engine.reference import difference
from tests.tiny_model import MAX_TOKENS, SPECIALS, make_tiny_model, vocabulary, write_tokenizer

# float32 keeps 7 digits; two layers of sums over at most 77 numbers, in another order, lose one of them.
TOLERANCE = 1e-5
START, END = (vocabulary()[token] for token in SPECIALS)
RED, CAT = vocabulary()["red</w>"], vocabulary()["cat</w>"]
SIZE: dict[str, Any] = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> Iterator[Any]:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    with pytest.MonkeyPatch.context() as patch:
        # For its clip_skip, diffusers 0.42 looks for the final norm where transformers 5 no longer has it.
        patch.setattr(type(pipeline.text_encoder), "text_model", property(lambda encoder: encoder), raising=False)
        yield pipeline


def encoded(model: Model, prompt: str, clip_skip: int = 1) -> Tensor:
    return encode(model, Chunker(model.tokenizer, model.embeddings).chunks(prompt, "prompt"), clip_skip)


@torch.no_grad()
def by_hand(pipeline: Any, *chunks: list[int]) -> Tensor:
    """The reference's text encoder, a chunk at a time."""
    framed = [[START, *ids] + [END] * (MAX_TOKENS - 1 - len(ids)) for ids in chunks]
    return torch.cat([pipeline.text_encoder(torch.tensor([ids]))[0][0] for ids in framed])


@pytest.mark.parametrize("prompt", ["", "a red cat", "A Red CAT: isn't it, at 2:1?", "red " * 75])
@pytest.mark.parametrize("clip_skip", [1, 2])
@torch.no_grad()
def test_a_short_prompt_is_encoded_as_by_the_reference(
    model: Model, pipeline: Any, prompt: str, clip_skip: int
) -> None:
    theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, False, clip_skip=None if clip_skip == 1 else clip_skip - 1)
    assert difference(encoded(model, prompt, clip_skip), theirs[0]) < TOLERANCE


@torch.no_grad()
def test_the_padding_of_sd2_is_encoded_as_by_the_reference(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny")
    write_tokenizer(folder / "tokenizer", pad="!")
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs, _ = pipeline.encode_prompt("a red cat", "cpu", 1, False)
    assert difference(encoded(load_model(folder), "a red cat"), theirs[0]) < TOLERANCE


@pytest.mark.parametrize(("count", "sizes"), [(76, (75, 1)), (150, (75, 75)), (151, (75, 75, 1))])
def test_a_long_prompt_is_its_chunks_each_encoded_by_itself(
    model: Model, pipeline: Any, count: int, sizes: tuple[int, ...]
) -> None:
    ours = encoded(model, "red " * count)
    assert ours.shape == (MAX_TOKENS * len(sizes), 32)
    assert difference(ours, by_hand(pipeline, *([RED] * size for size in sizes))) < TOLERANCE


def test_the_chunk_after_a_break_is_encoded_by_itself(model: Model, pipeline: Any) -> None:
    assert difference(encoded(model, "red BREAK cat"), by_hand(pipeline, [RED], [CAT])) < TOLERANCE


def test_emphasis_weighs_the_encoded_tokens_and_keeps_their_mean(model: Model, pipeline: Any) -> None:
    plain = by_hand(pipeline, [RED, CAT, RED]).double().numpy()
    weights = np.array([1, 1, 1.3, 1 / 1.1, *[1] * 73])
    weighted = plain * weights[:, None]
    expected = torch.from_numpy(weighted * (plain.mean() / weighted.mean()))
    # The means are sums of 2464 numbers that mostly cancel, so their ratio has two digits less than the numbers.
    assert difference(encoded(model, "red (cat:1.3) [red]"), expected) < 1e-4


def test_each_chunk_keeps_a_mean_of_its_own(model: Model, pipeline: Any) -> None:
    ours, plain = encoded(model, "(red:2) BREAK cat"), by_hand(pipeline, [RED], [CAT])
    assert difference(ours[MAX_TOKENS:], plain[MAX_TOKENS:]) < TOLERANCE
    # The same loss of digits in a mean near zero.
    assert float(ours[:MAX_TOKENS].mean()) == pytest.approx(float(plain[:MAX_TOKENS].mean()), rel=1e-4)
    assert difference(ours[:MAX_TOKENS], plain[:MAX_TOKENS]) > 0.1


@torch.no_grad()
def test_emphasis_that_changes_no_weight_changes_no_bit(model: Model, pipeline: Any) -> None:
    assert torch.equal(encoded(model, "a (red:1.0) cat"), encoded(model, "a red cat"))
    theirs, _ = pipeline.encode_prompt("a (red) cat [at]", "cpu", 1, False)
    assert difference(encoded(model, r"a \(red\) cat \[at\]"), theirs[0]) < TOLERANCE


def test_emphasis_is_reckoned_in_float32_whatever_the_dtype() -> None:
    plain = torch.randn((77, 32), generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [1.0, 1.3, 1 / 1.1, *[1.0] * 74]
    assert torch.equal(emphasized(plain, weights), emphasized(plain.float(), weights).bfloat16())


def test_weights_whose_mean_vanishes_are_still_numbers() -> None:
    assert torch.equal(emphasized(torch.ones(2, 4), [1.0, -1.0]), torch.tensor([[1.0] * 4, [-1.0] * 4]))


@pytest.mark.parametrize(
    ("request_", "lengths"),
    [
        (Request("red"), [77, 77]),
        (Request("red", guidance=None), [77]),
        (Request("red", guidance=1.0, negative_prompt="cat " * 76), [77]),
        (Request("red " * 151), [231, 231]),
        (Request("red", negative_prompt="cat " * 76), [154, 154]),
    ],
)
def test_both_sides_of_guidance_have_equally_many_chunks(model: Model, request_: Request, lengths: list[int]) -> None:
    assert [tokens(context) for context in PromptEncoder(model).contexts(request_)] == lengths


@torch.no_grad()
def test_the_shorter_side_is_filled_up_with_empty_chunks(model: Model, pipeline: Any) -> None:
    negative, _ = PromptEncoder(model).contexts(Request("red " * 76, negative_prompt="cat"))
    filled = model.unet.context(by_hand(pipeline, [CAT], []))
    for ours, theirs in zip(negative.layers, filled.layers, strict=True):
        assert difference(ours, theirs) < TOLERANCE


@torch.no_grad()
def test_the_unet_predicts_from_contexts_what_the_reference_does_from_its_prompts(model: Model, pipeline: Any) -> None:
    request = Request("a red cat", negative_prompt="at")
    positive, negative = pipeline.encode_prompt(request.prompt, "cpu", 1, True, request.negative_prompt)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    times = torch.tensor([500.0, 500.0])
    theirs = pipeline.unet(latents, times, torch.cat([negative, positive])).sample
    ours = model.unet(latents, times, join(PromptEncoder(model).contexts(request)))
    assert difference(ours, theirs) < 2e-5  # as in test_unet


def test_layers_that_the_text_encoder_does_not_have_are_refused(model: Model) -> None:
    with pytest.raises(InvalidRequest, match="clip_skip=3 is not allowed: 1 to 2, for 2 are the layers of the text"):
        PromptEncoder(model).contexts(Request("red", clip_skip=3))
    with pytest.raises(InvalidRequest, match="negative_prompt='17 chunks'"):
        PromptEncoder(model).contexts(Request("red", negative_prompt="red " * 1201))


def test_a_prompt_that_cannot_be_encoded_fails_alone(model: Model) -> None:
    engine = Engine(model)
    ids = [engine.add(request) for request in (POOL[0], Request("BREAK " * 16 + "red", **SIZE), POOL[3])]
    endings: dict[int, Exception | None] = {}
    while not engine.idle:
        endings |= {finished.id: finished.error for finished in engine.step()}
    assert [type(endings[id]) for id in ids] == [type(None), InvalidRequest, type(None)]


def same(a: tuple[Context, ...], b: tuple[Context, ...]) -> bool:
    """Whether they are the same values, not only equal ones."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def test_a_prompt_seen_before_is_not_encoded_again(model: Model) -> None:
    encoder = PromptEncoder(model)
    first = encoder.contexts(Request("red", negative_prompt="cat"))
    assert same(encoder.contexts(Request("red", negative_prompt="cat", seed=5)), first)
    assert same(encoder.contexts(Request("cat", guidance=None)), first[:1])
    assert not same(encoder.contexts(Request("cat", guidance=None, clip_skip=2)), first[:1])
    # With a longer neighbour it has an empty chunk more.
    assert not same(encoder.contexts(Request("cat " * 76, negative_prompt="red"))[:1], first[1:])
    both = encoder.contexts(Request("red", negative_prompt="red"))
    assert both[0] is both[1] is first[1]


def test_the_cache_keeps_its_bound_and_forgets_the_least_recently_used(model: Model) -> None:
    def context(prompt: str) -> Context:
        return encoder.contexts(Request(prompt, guidance=None))[0]

    size = PromptEncoder(model).contexts(Request("red", guidance=None))[0].bytes
    encoder = PromptEncoder(model, cache_bytes=2 * size + size // 2)
    red, cat = context("red"), context("cat")
    assert context("red") is red
    context("at")
    assert encoder.cache.bytes == 2 * size
    assert context("red") is red
    assert context("cat") is not cat
    context("red " * 200)  # larger than all that may be kept: the others stay
    assert context("red") is red


def test_a_bound_of_nothing_keeps_nothing_and_a_pair_is_still_whole(model: Model) -> None:
    encoder = PromptEncoder(model, cache_bytes=0)
    negative, positive = encoder.contexts(Request("red", negative_prompt="cat"))
    assert encoder.cache.bytes == 0
    assert not torch.equal(negative.layers[0], positive.layers[0])
    assert encoder.contexts(Request("red", guidance=None))[0] is not positive


def test_a_bound_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_bytes=-1 is not allowed"):
        ContextCache(-1)


POOL = [
    Request("red", negative_prompt="cat", seed=1, steps=3, sampler="euler", **SIZE),
    Request("(red:1.4) cat", negative_prompt="cat", seed=2, steps=2, sampler="ddim", clip_skip=2, **SIZE),
    Request("red " * 80, negative_prompt="cat", seed=3, steps=3, sampler="euler_a", **SIZE),
    Request("cat", seed=4, steps=2, guidance=None, sampler="euler", **SIZE),
    Request("red BREAK cat BREAK at", seed=5, steps=2, guidance=3.0, sampler="euler", **SIZE),
]


def test_pictures_with_and_without_the_cache_have_the_same_bits(model: Model) -> None:
    requests = [*POOL, *(replace(request, seed=9) for request in POOL)]
    kept = Engine(model).render(requests)
    tight = Engine(model, cache_bytes=200_000).render(requests)
    nothing = Engine(model, cache_bytes=0).render(requests)
    again = Engine(model)
    again.render(POOL)
    for pictures in (tight, nothing, again.render(requests)):
        assert all(np.array_equal(a, b) for a, b in zip(kept, pictures, strict=True))


def test_prompts_of_different_lengths_share_a_unet_call_and_each_picture_is_the_one_drawn_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [Engine(model).render([request])[0] for request in POOL]
    calls: list[list[int]] = []
    forward = model.unet.forward

    def counted(x: Tensor, t: Tensor, context: PackContext) -> Tensor:
        calls.append([len(run) for run in context.runs])
        return forward(x, t, context)

    monkeypatch.setattr(model.unet, "forward", counted)
    together = Engine(model).render(POOL)
    # Of one chunk, of two and of three: each length attends in one call.
    assert calls[:2] == [[5, 2, 2], [5, 2, 2]]
    for a, b in zip(alone, together, strict=True):
        # Matrix kernels add in another order for another batch; a value between two levels may round the other way.
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
