"""Second stage: a tokenizer made for our captions, and a text encoder that has learned what they say.

The text encoder is taught to tell the scene from the caption before the U-Net sees it: the summary then stands in the
end-of-text token and in all that follow it, where cross-attention finds it at once.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_engine.clip import ClipTextEncoder
from sd_engine.tokenizer import Tokenizer
from sd_engine.training.drawings import COLOURS, RELATIONS, SHAPES, SIZES, Scene, draw_scene_at_random, vocabulary

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (Radford et al. 2019, GPT-2), by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def learn_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in rank order, by which each word becomes one token and earlier words keep theirs."""
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + END_OF_WORD]
        for pair in merges:
            symbols = _merged(symbols, pair)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = _merged(symbols, merges[-1])
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def write_tokenizer(folder: Path, max_tokens: int) -> int:
    """Write the files of a CLIP tokenizer that knows our words; returns the size of its vocabulary.

    Words that it does not know are spelt out in single bytes, so any prompt can be encoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_characters()
    merges = learn_merges(vocabulary())
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *("".join(pair) for pair in merges), START, END]
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_tokens, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return len(ids)


_NOTHING = "nothing"
_QUESTIONS: tuple[tuple[str, ...], ...] = (
    tuple(COLOURS),
    *(((*COLOURS, _NOTHING), (*SHAPES, _NOTHING), (*SIZES, _NOTHING)) * 2),
    (*RELATIONS, _NOTHING),
)


def answers(scene: Scene) -> list[int]:
    """What a caption tells, as class numbers: background; colour, shape and size of both things; their relation."""
    told: list[str] = [scene.background]
    for i in range(2):
        thing = scene.things[i] if i < len(scene.things) else None
        told += [thing.colour, thing.shape, thing.size] if thing else [_NOTHING] * 3
    told.append(next((r for r in RELATIONS if f" {r} " in scene.caption), _NOTHING))
    return [question.index(answer) for question, answer in zip(_QUESTIONS, told, strict=True)]


def train_text_encoder(encoder: ClipTextEncoder, tokenizer: Tokenizer, steps: int, seed: int, batch: int = 64) -> float:
    """Teach the encoder to answer all questions from any token at or after the end of the text.

    Returns the share of right answers in the last batch.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    end_id = tokenizer.encode([""])[0, 1]
    heads = nn.Linear(encoder.config.width, sum(map(len, _QUESTIONS)))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    right = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50, 2 * (1 - step / steps))
        scenes = [draw_scene_at_random(rng, two_things=0.5) for _ in range(batch)]
        ids_BT = tokenizer.encode([scene.caption for scene in scenes])
        logits_BTK = heads(encoder(ids_BT))
        wanted = torch.tensor([answers(scene) for scene in scenes])
        loss, right = _judge(logits_BTK, ids_BT == end_id, wanted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return right


def _judge(logits_BTK: Tensor, after_end_BT: Tensor, wanted_BQ: Tensor) -> tuple[Tensor, float]:
    """Mean cross-entropy over questions and the tokens that should know, and the share of right answers."""
    losses, right = [], []
    for q, part in enumerate(logits_BTK.split([len(question) for question in _QUESTIONS], dim=-1)):
        known = part[after_end_BT]
        target = wanted_BQ[:, q, None].expand_as(after_end_BT)[after_end_BT]
        losses.append(F.cross_entropy(known, target))
        right.append((known.argmax(-1) == target).float().mean())
    return torch.stack(losses).mean(), float(torch.stack(right).mean())
