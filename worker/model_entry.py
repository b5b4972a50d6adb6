"""A model on the shelf: what `nightshift.json` in its folder says of it. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import NightshiftError

MANIFEST = "nightshift.json"
_FORM = 1  # of the manifest
_CHUNK = 1 << 20
#: The fields of a `Source` that are paths. The model's own comes last: the others may lie in it.
PATHS = ("tokenizer", "vae", "embeddings", "tiny_decoder", "path")

#: Told how many bytes more were read, and how many there are in all.
Progress = Callable[[int, int], None]


def unseen(read: int, total: int) -> None:
    pass


class ShelfError(NightshiftError):
    """The shelf has no such model, cannot take one, or cannot be read; says what to do."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model's file or folder, and how it is loaded: what `load_model` takes. None and False: not given."""

    path: Path
    tokenizer: Path | None = None
    vae: Path | None = None
    embeddings: Path | None = None
    tiny_decoder: Path | None = None
    variant: str | None = None
    ema: bool = False
    prediction: str | None = None
    zero_snr: bool | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `load_model` that were given."""
        return {name: value for name, value in asdict(self).items() if name != "path" and value not in (None, False)}


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model: its size in bytes and its sha256, as they were when it was added."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A model on the shelf. `files`: by path; those outside `folder` are only linked to. `origin`: where it is from."""

    name: str
    folder: Path
    source: Source
    origin: str
    files: Mapping[Path, File]

    @property
    def linked(self) -> bool:
        """Whether the model itself stays where it was."""
        return not self.source.path.is_relative_to(self.folder)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files.values())

    def problems(self) -> list[str]:
        """What can be seen without reading the files: those that are gone or have another size."""
        return [problem for path, file in self.files.items() if (problem := _changed(path, file))]

    def damages(self, progress: Progress = unseen) -> list[str]:
        """What reading every file shows: also those of the old size whose bytes are others."""
        seen = partial(told_of, progress, self.size)
        return [problem for path, file in self.files.items() if (problem := _damaged(path, file, seen))]


def reason(error: OSError) -> str:
    """What the system says, and of which file: of a copy its target, because that is where a disk is full."""
    said, file = error.strerror or str(error), error.filename2 or error.filename
    return f"{said} ({file})" if file else said


def _changed(path: Path, file: File) -> str:
    try:
        if not path.is_file():
            return f"{path} is gone; put it back, or remove the model and add it again"
        size = path.stat().st_size
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return "" if size == file.size else f"{path} has {size} bytes instead of {file.size}; add the model again"


def told_of(progress: Progress, total: int, read: int) -> None:
    progress(read, total)


def _damaged(path: Path, file: File, seen: Callable[[int], None]) -> str:
    if problem := _changed(path, file):
        return problem
    return "" if sha256(path, seen) == file.sha256 else f"{path} is not what was added; add the model again"


def source_at(path: Path) -> Source:
    """How the model at a path is loaded: as its manifest says if it is one of a shelf, else as it stands.

    Raises ShelfError for a manifest that cannot be read.
    """
    if (path / MANIFEST).is_file():
        return read_entry(path).source
    return Source(path)


def read_entry(folder: Path) -> Entry:
    """The model in a folder of the shelf. Raises ShelfError when its manifest cannot be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["form"] != _FORM:
            raise ValueError(f"its form is {manifest['form']!r}, known is {_FORM}")
        source = {name: value for name, value in manifest["source"].items() if value is not None}
        places = {name: folder / source[name] for name in PATHS if name in source}
        files = {folder / path: File(**file) for path, file in manifest["files"].items()}
        return Entry(folder.name, folder, Source(**(source | places)), str(manifest["origin"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ShelfError(f"{folder / MANIFEST} cannot be read ({reason}); remove the model and add it again") from error


def write_manifest(entry: Entry) -> None:
    def shown(path: Path) -> str:
        return str(path.relative_to(entry.folder) if path.is_relative_to(entry.folder) else path.absolute())

    source = {name: shown(value) if isinstance(value, Path) else value for name, value in asdict(entry.source).items()}
    files = {shown(path): asdict(file) for path, file in entry.files.items()}
    manifest = {"form": _FORM, "origin": entry.origin, "source": source, "files": files}
    with (entry.folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path, seen: Callable[[int], None] = lambda read: None) -> str:
    """The sha256 of a file, in hexadecimal digits. `seen` is told of every piece that was read, in bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            seen(len(chunk))
    return digest.hexdigest()
