"""A few steps of the shipped model's whole recipe: it runs, it resumes, and what it writes is a model."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from sd_engine import Engine, Request, load_model
from sd_engine.clip import ClipTextEncoder
from sd_engine.tokenizer import Tokenizer
from sd_engine.training import mini
from sd_engine.training.captions import answers, learn_merges, train_text_encoder, write_tokenizer
from sd_engine.training.cli import train_mini
from sd_engine.training.drawings import COLOURS, draw_scene_at_random, paint, vocabulary

SHORT = mini.MiniRecipe()
SHORT = replace(
    SHORT,
    text_steps=2,
    vae=replace(SHORT.vae, steps=2, batch=2),
    unet=replace(SHORT.unet, steps=2, batch=2, pictures=160),
    tiny_decoder=replace(SHORT.tiny_decoder, steps=2, batch=2),
)


def lines(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_the_recipe_runs_resumes_and_leaves_a_model_that_draws(tmp_path: Path) -> None:
    folder = mini.train_mini(tmp_path, SHORT, lambda line: None)
    assert lines(tmp_path / "unet.log.jsonl") == [2]
    # Two steps more: everything before them comes from the checkpoints.
    longer = replace(SHORT, unet=replace(SHORT.unet, steps=4))
    assert mini.train_mini(tmp_path, longer, lambda line: None) == folder
    assert lines(tmp_path / "unet.log.jsonl") == [2, 4]
    assert lines(tmp_path / "vae.log.jsonl") == [2]
    request = Request("a red star on a blue background", steps=2)
    pictures = Engine(load_model(folder)).render([request, replace(request, decoder="tiny")])
    assert [picture.shape for picture in pictures] == [(96, 96, 3)] * 2


def test_the_command_says_what_it_trains_and_where_the_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "MiniRecipe", lambda: SHORT)
    result = CliRunner().invoke(train_mini, ["--out", str(tmp_path / "out"), "--vae-steps", "1", "--unet-steps", "1"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "nightshift-mini" / "model_index.json").exists()


def test_each_word_of_a_caption_is_one_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 32)
    tokenizer = Tokenizer.from_folder(tmp_path, max_tokens=32)
    empty = tokenizer.encode([""])[0]
    for word in vocabulary():
        ids = tokenizer.encode([word])[0]
        assert ids[0] == empty[0] and ids[2] == empty[1], f"{word} is more than one token"
    # What it does not know is spelt out: no prompt is refused, none becomes the empty one.
    assert not torch.equal(tokenizer.encode(["zebra, née 日本 🙂"])[0], empty)


def test_later_words_leave_the_merges_of_earlier_words_alone() -> None:
    assert learn_merges(["red", "green", "re"])[: len(learn_merges(["red"]))] == learn_merges(["red"])


def test_the_text_encoder_learns_what_captions_tell(tmp_path: Path) -> None:
    vocab_size = write_tokenizer(tmp_path, 32)
    config = replace(mini.text_config(vocab_size), width=64, mlp_width=128)
    encoder, tokenizer = ClipTextEncoder(config), Tokenizer.from_folder(tmp_path, max_tokens=32)
    # Always giving the most frequent answer is right in 0.35 of the cases (a ninth of the colours, half of "nothing").
    assert train_text_encoder(encoder, tokenizer, steps=150, seed=1, batch=32) > 0.5


def test_a_scene_is_painted_in_the_colours_that_its_caption_names() -> None:
    rng = random.Random(5)
    for _ in range(20):
        scene = draw_scene_at_random(rng, two_things=0.0)
        pixels = paint(scene, 96, 64, rng)
        assert pixels.shape == (64, 96, 3)
        assert np.abs(pixels[0, 0].astype(int) - COLOURS[scene.background]).max() <= 6  # the stated jitter
        assert scene.background in scene.caption and scene.things[0].shape in scene.caption
        assert len(answers(scene)) == 8
