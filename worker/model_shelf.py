"""The shelf: the models that were added to this machine, each in a folder of its own in the data directory.

    <home>/models/NAME/nightshift.json     what it was made from, and how it is loaded
    <home>/models/NAME/...                 a single file and its tokenizer/, or the files of a diffusers folder
    <home>/models/NAME/extras, embeddings  what was given beside it

A model is put together in a hidden folder beside the others and renamed when it is whole, so that nobody ever sees a
part of one. No torch here.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.fields import MODEL_NAME
from jobs.settings import SHIPPED, Settings
from worker.model_entry import MANIFEST, PATHS, Entry, Progress, ShelfError, Source, read_entry, reason, unseen
from worker.model_files import BadModel
from worker.model_placing import put_together, with_tiny_decoder

PULLING = "pulling-"  # begins the name of the workplace of a pull
_ADDING, _REMOVING = "adding-", "removing-"
_TAKEN = (*SHIPPED, "embeddings")  # where the engine would look for the embeddings of every model on the shelf


class Shelf:
    """The models in the data directory `home`."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "models"

    def names(self) -> list[str]:
        """What is on the shelf, whether it can be read or not."""
        found = self.folder.glob(f"*/{MANIFEST}")
        return sorted(path.parent.name for path in found if re.fullmatch(MODEL_NAME, path.parent.name))

    def unfinished(self) -> list[Path]:
        """What interrupted pulls left, to go on from."""
        return sorted(self.folder.glob(f".{PULLING}*"))

    def left_over(self) -> list[Path]:
        """What killed processes left, and what others are at work on."""
        return sorted(path for kind in (_ADDING, _REMOVING) for path in self.folder.glob(f".{kind}*"))

    def entry(self, name: str) -> Entry:
        """One model. Raises ShelfError when there is none, or when its manifest cannot be read."""
        if name not in self.names():
            known = ", ".join(self.names()) or "it is empty"
            raise ShelfError(
                f"there is no model {name!r} on the shelf {self.folder} ({known}); `nightshift models add {name} FILE` "
                "puts one there"
            )
        return read_entry(self.folder / name)

    def add(
        self,
        name: str,
        source: Source,
        *,
        origin: str,
        check: Callable[[Source], None],
        link: bool = False,
        progress: Progress = unseen,
    ) -> Entry:
        """Put a model on the shelf, whole or not at all.

        Args:
            source: what to take; its files are hard-linked where the file system can, else copied.
            origin: where it is from, for people.
            check: called with the model as it would be served; what it raises is passed on, and nothing is added.
            link: leave the model's own files where they are.
        Raises ShelfError for a name that is taken or not allowed, and when the files cannot be put there; BadModel.
        """
        self.check_name(name)
        source = with_tiny_decoder(source)
        try:
            with self.workplace(f"{_ADDING}{name}") as folder:
                entry = put_together(folder, source, origin, link, progress)
                try:
                    check(entry.source)
                except BadModel as error:  # told of the files as they were given: those in the workplace go
                    raise BadModel(_as_given(str(error), entry.source, source)) from error
                folder.rename(self.folder / name)
        except OSError as error:
            raise ShelfError(f"{name} cannot be added: {reason(error)}") from error
        return self.entry(name)

    def check_name(self, name: str) -> None:
        """Raises ShelfError for a name that no job can ask for or that is taken."""
        if not re.fullmatch(MODEL_NAME, name):
            allowed = "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"
            raise ShelfError(f"{name!r} is no name for a model: {allowed}")
        if name in _TAKEN:
            raise ShelfError(f"{name} is a name that Nightshift itself uses; choose another name")
        if (self.folder / name).exists():
            raise ShelfError(
                f"there is a model {name} already; `nightshift models remove {name}`, or choose another name"
            )

    def remove(self, name: str) -> Entry:
        """Take a model off the shelf, files and all; what it only links to stays. Raises ShelfError."""
        if name not in self.names():
            self.entry(name)  # says what there is
        entry = _read_or_none(self.folder / name)
        gone = self.folder / f".{_REMOVING}{name}-{os.getpid()}"
        try:
            (self.folder / name).rename(gone)  # first, so that half a model is never seen
            shutil.rmtree(gone)
        except OSError as error:
            raise ShelfError(f"{name} cannot be removed: {reason(error)}") from error
        return entry or Entry(name, self.folder / name, Source(self.folder / name), "", {})

    @contextmanager
    def workplace(self, name: str, *, keep: bool = False) -> Iterator[Path]:
        """A hidden folder on the shelf's file system, ours alone until the end; then removed, if it is still there.

        `keep`: what is in it stays, at the beginning and after an error, so that the next one goes on from there.
        Raises ShelfError when another process is in it.
        """
        folder = self.folder / f".{name}"
        for made in (self.folder.parent, self.folder, folder):  # each for its owner alone, as the home is
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not keep:
                _empty(folder)  # what a killed process left
            yield folder
        except BlockingIOError:
            raise ShelfError(f"another process works in {folder}; wait until it has ended") from None
        except BaseException:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def served(settings: Settings) -> dict[str, Path | str]:
    """The models that NIGHTSHIFT_MODELS asks for, each a path or `shipped`; unset: the shipped one and the shelf's."""
    shelf = Shelf(settings.home)
    models = dict(settings.models)
    if settings.serves_whole_shelf:
        models |= dict.fromkeys(shelf.names(), "shelf")
    return {name: shelf.folder / name if path == "shelf" else path for name, path in models.items()}


def _as_given(said: str, placed: Source, given: Source) -> str:
    """A sentence about a model's files on the shelf, with the paths that they came from."""
    for name in PATHS:
        here, there = getattr(placed, name), getattr(given, name)
        said = said if here is None or there is None else said.replace(str(here), str(there))
    return said


def _read_or_none(folder: Path) -> Entry | None:
    try:
        return read_entry(folder)
    except ShelfError:
        return None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
