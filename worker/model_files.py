"""Which files of a model are needed: chosen by name alone, in a folder or on a hub. No torch, no network here.

Names are relative, with `/` between their parts. Only names of the known forms are ever chosen, so neither code nor a
name that leads out of the folder can be among them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from jobs.errors import NightshiftError

#: The folder of a model's TAESD, which no model must have.
TINY_DECODER = "tiny_decoder"
#: Component of a diffusers folder -> stems of its weights: as safetensors, as a pickle.
COMPONENTS = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
    "vae": ("diffusion_pytorch_model", "diffusion_pytorch_model"),
}
_STEMS = {**COMPONENTS, TINY_DECODER: ("diffusion_pytorch_model", "diffusion_pytorch_model")}
_BARE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # as the engine looks for `unet.safetensors` and so on
_CHECKPOINTS = (".safetensors", ".ckpt")
_TOKENIZER = ("vocab.json", "merges.txt")
_TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json")
_CONFIGS = ("model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in COMPONENTS))


class BadModel(NightshiftError):
    """What was given is no model that can be added; says what is missing and the remedy."""


def is_folder_model(names: Collection[str]) -> bool:
    """Whether these are the files of a diffusers folder, or of one with bare component files."""
    return "unet/config.json" in names or _bare(names, "unet") is not None


def folder_files(names: Collection[str], *, variant: str | None = None, tokenizer: bool = True) -> dict[str, str]:
    """What must be there of a folder's files for it to be loaded: name -> its name where no other variant is.

    Args:
        names: all there are.
        variant: take the weights of this variant (`fp16`) where a component has them; None: the plain ones if any.
        tokenizer: whether it is among the files needed.
    Raises BadModel for weights or a tokenizer that are not there.
    """
    words = tokenizer_files(names, "tokenizer/") if tokenizer else []
    tiny = tiny_decoder_files(names)
    if _bare(names, "unet") is not None:
        return {name: name for name in [*_all_bare(names), *words, *tiny]}
    if any(name.startswith("text_encoder_2/") for name in names):
        raise BadModel(
            "there are two text encoders, as in SDXL; only models of the SD 1.x and 2.x families are supported"
        )
    variants = {found for component in COMPONENTS for found, _ in _weights(names, component)}
    if variant is not None and variant not in variants:
        known = ", ".join(sorted(found or "the plain one" for found in variants)) or "none"
        raise BadModel(f"there are no weights of the variant {variant!r} (there is: {known}); choose another --variant")
    weights = [name for component in COMPONENTS for name in best_weights(names, component, variant)]
    configs = [name for name in _CONFIGS if name in names]
    return {name: name for name in (*configs, *words, *tiny)} | {name: _plain(name) for name in weights}


def _bare(names: Collection[str], component: str) -> str | None:
    return next((component + suffix for suffix in _BARE if component + suffix in names), None)


def _all_bare(names: Collection[str]) -> list[str]:
    found = {component: _bare(names, component) for component in COMPONENTS}
    lacking = [component for component, name in found.items() if name is None]
    if lacking:
        raise BadModel(f"there is no {lacking[0]}.safetensors beside the U-Net's file; copy it there")
    return [name for name in found.values() if name is not None]


def tiny_decoder_files(names: Collection[str]) -> list[str]:
    """Of the tiny decoder's folder; none where it is not there whole."""
    config = f"{TINY_DECODER}/config.json"
    if config not in names or not _weights(names, TINY_DECODER):
        return []
    return [config, *best_weights(names, TINY_DECODER)]


_SHARD = r"-\d{5}-of-\d{5}"


def _weights(names: Iterable[str], component: str) -> dict[tuple[str | None, str], list[str]]:
    """(variant, `safetensors` or `bin`) -> the files with it: one, or shards and their index."""
    found: dict[tuple[str | None, str], list[str]] = {}
    for kind, stem in zip(("safetensors", "bin"), _STEMS[component], strict=True):
        # The variant stands before or after: both orders are in use.
        weights = rf"{stem}(?:\.(\w+))?(?:{_SHARD})?(?:\.(\w+))?\.{kind}"
        index = rf"{stem}(?:\.(\w+))?\.{kind}\.index(?:\.(\w+))?\.json"
        form = re.compile(rf"{component}/(?:{weights}|{index})")
        for name in names:
            if match := form.fullmatch(name):
                found.setdefault((next(filter(None, match.groups()), None), kind), []).append(name)
    return found


def best_weights(names: Iterable[str], component: str, variant: str | None = None) -> list[str]:
    """A component's weights, safetensors before pickles, whole before sharded. Raises BadModel if there are none."""
    found = _weights(names, component)
    others = sorted(other for other, _ in found if other is not None)
    for kind in ("safetensors", "bin"):
        for wanted in (variant, None, *others):
            files = sorted(found.get((wanted, kind), []))
            if whole := [name for name in files if not _is_sharded(name)]:
                return whole[:1]
            if files:
                return files
    raise BadModel(f"{component}/ has no weights; a diffusers folder has {_STEMS[component][0]}.safetensors there")


def _is_sharded(name: str) -> bool:
    return bool(re.search(rf"{_SHARD}|\.index\b", name))


def _plain(name: str) -> str:
    """Without the variant; shards keep it, because their index names them."""
    return name if _is_sharded(name) else re.sub(r"\.\w+(\.(?:safetensors|bin))$", r"\1", name)


def tokenizer_files(names: Collection[str], folder: str = "") -> list[str]:
    """The tokenizer's files in this folder (`""` or `"tokenizer/"`). Raises BadModel when the two that matter lack."""
    missing = [folder + name for name in _TOKENIZER if folder + name not in names]
    if missing and folder + "tokenizer.json" not in names:
        raise BadModel(f"there is no {' and no '.join(missing)}; a tokenizer has both, --tokenizer names one")
    return [folder + name for name in (*_TOKENIZER, *_TOKENIZER_EXTRAS) if folder + name in names]


def checkpoint_file(names: Iterable[str], wanted: str | None = None) -> str:
    """The single-file checkpoint among these names, the safetensors before the pickle.

    Raises BadModel for none, or for several of which none is wanted.
    """
    found = sorted(name for name in names if name.endswith(_CHECKPOINTS) and _stays_inside(name))
    top = [name for name in found if "/" not in name]
    preferred = [name for name in top if name.endswith(".safetensors")] or top
    candidates = preferred if wanted is None else [name for name in found if name == wanted]
    if len(candidates) == 1:
        return candidates[0]
    there = f"there is: {', '.join(found) or 'none'}"
    if wanted is not None:
        raise BadModel(f"there is no checkpoint {wanted!r} ({there}); choose another --file")
    if candidates:
        raise BadModel(f"there are several checkpoints: {', '.join(candidates)}; choose one with --file")
    raise BadModel(
        f"there is neither a diffusers folder nor a checkpoint on the first level ({there}); choose with --file"
    )


def _stays_inside(name: str) -> bool:
    return bool(re.fullmatch(r"[^/\\\0]+(/[^/\\\0]+)*", name)) and not {"..", "."} & set(name.split("/"))


def names_in(folder: Path) -> set[str]:
    """The files of a folder and of those in it, as relative names; no deeper, where no model has any."""
    found = (*folder.glob("*"), *folder.glob("*/*"))
    return {path.relative_to(folder).as_posix() for path in found if path.is_file()}
