"""Models from a hub to the shelf's file system: what is needed of a repository and no more, kept until it is whole.

Nothing but `nightshift models pull` and `add` comes here: a worker never asks a hub.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from worker.model_entry import Source, reason
from worker.model_files import (
    TINY_DECODER,
    BadModel,
    checkpoint_file,
    folder_files,
    is_folder_model,
    names_in,
    tiny_decoder_files,
    tokenizer_files,
)
from worker.model_hub import Hub, PullError, Remote, arrived
from worker.model_shelf import PULLING, Shelf

PUBLIC = Hub()
_SPARE = 64 << 20  # bytes that stay free on the disk


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was fetched: a folder with the hub's names, the commit that they are of."""

    folder: Path
    commit: str


@contextmanager
def pulled(
    shelf: Shelf,
    repository: str,
    choose: Callable[[Collection[str]], Iterable[str]],
    revision: str | None = None,
    *,
    hub: Hub = PUBLIC,
) -> Iterator[Pulled]:
    """Fetch the chosen files of a repository (`org/name`); they are removed at the end, and kept after an error.

    So the next attempt goes on where this one stopped. Raises PullError, HubUnavailable (trying again can help),
    ShelfError when another process pulls the same, and whatever `choose` raises.
    """
    listing = hub.listing(repository, revision)
    wanted = [listing.files[name] for name in choose(listing.files)]
    with shelf.workplace(f"{PULLING}{repository.replace('/', '--')}@{listing.commit[:12]}", keep=True) as folder:
        _check_space(folder, wanted)
        try:
            for remote in sorted(wanted, key=lambda remote: remote.size):  # what is small and wrong shows early
                hub.fetch(listing, remote, folder / remote.name)
        except OSError as error:
            raise PullError(f"{repository} cannot be stored: {reason(error)}") from error
        yield Pulled(folder, listing.commit)


@contextmanager
def pulled_model(
    shelf: Shelf,
    repository: str,
    revision: str | None = None,
    *,
    variant: str | None = None,
    file: str | None = None,
    tokenizer: bool = True,
    hub: Hub = PUBLIC,
) -> Iterator[tuple[Source, str]]:
    """A model and, unless it comes from elsewhere, its `tokenizer`; with the commit that they are of. See `pulled`."""
    choose = partial(model_files, variant=variant, file=file, tokenizer=tokenizer)
    with pulled(shelf, repository, choose, revision, hub=hub) as fetched:
        folder, names = fetched.folder, names_in(fetched.folder)
        if file is None and is_folder_model(names):
            yield Source(folder, variant=variant), fetched.commit
        else:
            words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
            tiny = folder / TINY_DECODER if (folder / TINY_DECODER).is_dir() else None
            path = folder / (file or checkpoint_file(names))
            yield Source(path, words if tokenizer else None, tiny_decoder=tiny), fetched.commit


def model_files(names: Collection[str], *, variant: str | None, file: str | None, tokenizer: bool) -> list[str]:
    """What a model needs of a repository: a diffusers folder if it is one and no `file` is named, else a checkpoint.

    tokenizer: whether it must come from there too. Raises BadModel.
    """
    if file is None and is_folder_model(names):
        return list(folder_files(names, variant=variant, tokenizer=tokenizer))
    checkpoint = checkpoint_file(names, file)
    return [checkpoint, *(tokenizer_of(names) if tokenizer else []), *tiny_decoder_files(names)]


def tokenizer_of(names: Collection[str]) -> list[str]:
    """The tokenizer's files of a repository: in `tokenizer/`, or of a repository that is one. Raises BadModel."""
    try:
        return tokenizer_files(names, "tokenizer/")
    except BadModel:
        return tokenizer_files(names)


def _check_space(folder: Path, wanted: Iterable[Remote]) -> None:
    rest = sum(remote.size - arrived(folder / remote.name) for remote in wanted)
    free = shutil.disk_usage(folder).free
    if rest + _SPARE > free:
        raise PullError(f"{rest} bytes are still to come and the disk of {folder.parent} has {free} free; make room")
