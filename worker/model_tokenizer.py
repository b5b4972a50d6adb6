"""Where a model's tokenizer comes from: a folder, a model on the shelf, or a hub, asked while the model is added."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.model_files import BadModel, names_in, tokenizer_files
from worker.model_pull import pulled, tokenizer_of
from worker.model_shelf import Shelf

_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"


@contextmanager
def tokenizer_for(shelf: Shelf, given: str | None, path: Path) -> Iterator[Path | None]:
    """The folder with the tokenizer that was `given` for the model at `path`; None for a folder that brings its own.

    Raises BadModel when there is none, PullError and HubUnavailable when it had to come from a hub and did not.
    """
    local = _beside(path) if given is None else _local(shelf, given)
    if local is not None or given is None:
        yield local
        return
    if not re.fullmatch(_ID, given):
        known = ", ".join(shelf.names()) or "nothing"
        raise BadModel(
            f"--tokenizer {given} is no folder with vocab.json and merges.txt, no model on the shelf ({known}), and no "
            "id of a hub (org/name)"
        )
    with pulled(shelf, given, tokenizer_of) as fetched:
        yield _in(fetched.folder)


def _beside(path: Path) -> Path | None:
    if path.is_dir():
        return None
    found = _in(path.parent / "tokenizer")  # where the engine would look, too
    if found is None:
        raise BadModel(
            f"{path} is a single file, and such a file has no tokenizer; add --tokenizer DIR (a folder with vocab.json "
            "and merges.txt), the id of a hub (for SD 1.x: openai/clip-vit-large-patch14), or a model on the shelf"
        )
    return found


def _local(shelf: Shelf, given: str) -> Path | None:
    if Path(given).is_dir():
        return _in(Path(given))
    if given not in shelf.names():
        return None
    source = shelf.entry(given).source
    return source.tokenizer or _in(source.path)


def _in(folder: Path) -> Path | None:
    """The folder, or its `tokenizer/`, if a tokenizer is there."""
    for candidate in (folder / "tokenizer", folder):
        try:
            tokenizer_files(names_in(candidate))
        except BadModel:
            continue
        return candidate.absolute()
    return None
