"""The files of a CLIP tokenizer's folder: its vocabulary, its special tokens, and what was added to both.

The reference reads them through `transformers`, whose import alone takes as long as torch's; the rules are these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE

_START, _END = "<|startoftext|>", "<|endoftext|>"
_NO_LIMIT: Final = 10**30  # more than any text encoder takes
_NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS: Final = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
_EXTRA: Final = ("extra_special_tokens", "additional_special_tokens")
# Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision": how a text falls apart.
_PARTS: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the files beside the vocabulary say.

    start, end, pad, unknown: special tokens. added: tokens beside the vocabulary, in their order; special ones are in
    it, too. limit: the most tokens of a text, start and end with it; whatever the file says, to be checked.
    """

    start: AddedToken
    end: AddedToken
    pad: AddedToken
    unknown: AddedToken
    added: tuple[AddedToken, ...]
    limit: object


def read_settings(folder: Path) -> Settings:
    """Of `tokenizer_config.json` and the files of older folders. Raises what a file that is no such file leads to."""
    config = _json(folder / "tokenizer_config.json")
    by_id = {int(key): AddedToken(**value) for key, value in config.get("added_tokens_decoder", {}).items()}
    if "added_tokens_decoder" not in config:
        config |= _json(folder / "special_tokens_map.json")
        by_id = _added_before(folder, {str(_token(value).content) for value in _specials(config)})
    by_name = {token.content: token for token in by_id.values()}
    values = {key: config.get(key) or _DEFAULTS.get(key) for key in _NAMED}
    named = {key: _token(value) for key, value in values.items() if value}
    named = {key: by_name.get(token.content, token) for key, token in named.items()}
    others = [*named.values(), *(_token(value) for value in _extras(config))]
    # A text that has two roles is added twice, and found as the last of them says: so does the reference.
    added = [*(by_id[key] for key in sorted(by_id)), *(token for token in others if token.content not in by_name)]
    limit = config.get("model_max_length", config.get("max_len"))
    return Settings(
        named["bos_token"], named["eos_token"], named["pad_token"], named["unk_token"], tuple(added),
        _NO_LIMIT if limit is None else limit,
    )  # fmt: skip


def read_words(folder: Path, settings: Settings) -> Tokenizer:
    """The vocabulary with its rules. Raises what the tokenizers library raises for a file that it cannot read."""
    words = Tokenizer(BPE(
        *_vocabulary(folder), continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False,
        unk_token=settings.unknown.content,
    ))  # fmt: skip
    words.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_PARTS), behavior="removed", invert=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    words.add_tokens(list(settings.added))
    return words


def _vocabulary(folder: Path) -> tuple[Any, Any]:
    """Of the newer file where it is there, as the reference has it."""
    whole = folder / "tokenizer.json"
    if not whole.is_file():
        return str(folder / "vocab.json"), str(folder / "merges.txt")
    model = _json(whole)["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return model["vocab"], merges


def _added_before(folder: Path, special: set[str]) -> dict[int, AddedToken]:
    """Tokens by id, of the files that older folders have, and of the newer one, which wins."""
    older = {
        index: AddedToken(token, normalized=token not in special, special=token in special)
        for token, index in _json(folder / "added_tokens.json").items()
    }
    newer = [dict(token) for token in _json(folder / "tokenizer.json").get("added_tokens", ())]
    return older | {token.pop("id"): AddedToken(**token) for token in newer}


def _specials(config: Mapping[str, Any]) -> Iterator[Any]:
    yield from (config[key] for key in _NAMED if config.get(key))
    yield from _extras(config)


def _extras(config: Mapping[str, Any]) -> Iterator[Any]:
    """Special tokens without a role; a newer file may give them names."""
    for value in (config.get(key) or () for key in _EXTRA):
        yield from value.values() if isinstance(value, dict) else value


def _token(value: Any) -> AddedToken:
    """A special token, written as its text alone, or with how it is found in a text."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    kept = {key: each for key, each in value.items() if key not in ("__type", "special")}
    return AddedToken(**kept, special=True)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no JSON object")
    return content
