"""Bring a model's files together in a folder of the shelf: hard-linked where the file system can, else copied."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from worker.model_entry import Entry, File, Progress, Source, sha256, told_of, write_manifest
from worker.model_files import (
    TINY_DECODER,
    BadModel,
    best_weights,
    folder_files,
    is_folder_model,
    names_in,
    tokenizer_files,
)

_EMBEDDINGS = (".pt", ".bin", ".safetensors")  # as the engine reads them; whatever lies beside them is not taken


def with_tiny_decoder(source: Source) -> Source:
    """With that beside a single file, where the engine finds it, unless another is given."""
    beside = source.path.parent / TINY_DECODER
    if source.tiny_decoder is not None or source.path.is_dir() or not beside.is_dir():
        return source
    return replace(source, tiny_decoder=beside)


def put_together(folder: Path, source: Source, origin: str, link: bool, progress: Progress) -> Entry:
    """Bring a model's files into `folder` and write its manifest."""
    placed = source if link else _place_model(source, folder)
    if source.tokenizer is not None:
        placed = replace(placed, tokenizer=_place_tokenizer(source.tokenizer, folder / "tokenizer"))
    if source.vae is not None:
        placed = replace(placed, vae=_place_component("vae", source.vae, folder / "extras"))
    if source.tiny_decoder is not None:
        given = _place_component(TINY_DECODER, source.tiny_decoder, folder / "extras")
        placed = replace(placed, tiny_decoder=given)
    if source.embeddings is not None:
        placed = replace(placed, embeddings=_place_embeddings(source.embeddings, folder / "embeddings"))
    elif not link and (source.path / "embeddings").is_dir():
        _place_embeddings(source.path / "embeddings", folder / "embeddings")  # where the engine looks for them
    outside = _files_of(source) if link else []
    paths = [*outside, *sorted(path for path in folder.rglob("*") if path.is_file())]
    sizes = {path: path.stat().st_size for path in paths}
    seen = partial(told_of, progress, sum(sizes.values()))
    files = {path: File(size, sha256(path, seen)) for path, size in sizes.items()}
    entry = Entry(folder.name, folder, placed, origin, files)
    write_manifest(entry)
    return entry


def _files_of(source: Source) -> list[Path]:
    """The files of the model itself, where they are."""
    return [source.path] if not source.path.is_dir() else [source.path / name for name in _needed(source)]


def _needed(source: Source) -> Mapping[str, str]:
    names = names_in(source.path)
    if not is_folder_model(names):
        raise BadModel(f"{source.path} is no diffusers folder (it has no unet/config.json); give one, or a file")
    try:
        return folder_files(names, variant=source.variant, tokenizer=source.tokenizer is None)
    except BadModel as error:
        raise BadModel(f"{source.path}: {error}") from None


def _place_model(source: Source, folder: Path) -> Source:
    if not source.path.is_dir():
        return replace(source, path=_place(source.path, folder / source.path.name))
    for name, plain in _needed(source).items():
        _place(source.path / name, folder / plain)
    return replace(source, path=folder, variant=None)  # no other is there


def _place_tokenizer(tokenizer: Path, target: Path) -> Path:
    for name in tokenizer_files(names_in(tokenizer)):
        _place(tokenizer / name, target / name)
    return target


def _place_component(component: str, given: Path, folder: Path) -> Path:
    """A file, or a component's folder, or that of a whole diffusers folder."""
    if not given.is_dir():
        return _place(given, folder / given.name)
    inside = given / component if (given / component).is_dir() else given
    names = {f"{component}/{name}" for name in names_in(inside)}
    try:
        weights = best_weights(names, component)
    except BadModel as error:
        raise BadModel(f"{given}: {error}") from None
    for name in (f"{component}/config.json", *weights):
        _place(inside / name.removeprefix(f"{component}/"), folder / name)
    return folder / component


def _place_embeddings(embeddings: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in embeddings.rglob("*"):
        if path.suffix.lower() in _EMBEDDINGS and path.is_file():
            _place(path, folder / path.relative_to(embeddings))
    return folder


def _place(source: Path, target: Path) -> Path:
    """A hard link where that is possible (same file system, our own file), else a copy on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve(strict=True)  # a model hub's cache is full of symbolic links
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
        with target.open("rb") as copied:
            os.fsync(copied.fileno())
    return target
