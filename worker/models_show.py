"""How the models command shows things: rows of a table, the parts of a model, a progress bar. No torch here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs.settings import SHIPPED, Settings
from worker.model_entry import Entry, Progress, ShelfError
from worker.model_shelf import Shelf, served

if TYPE_CHECKING:
    from sd_engine.inspection import Inspection

READY = "ready"


@dataclass(frozen=True, slots=True)
class Line:
    """A model as `list` shows it. `bytes`: None if it is not on the shelf. `served`: by a worker as set here."""

    name: str
    kind: str
    bytes: int | None
    path: str
    state: str
    served: bool


def lines(settings: Settings) -> list[Line]:
    """The shipped model, the shelf, and what NIGHTSHIFT_MODELS names besides."""
    shelf, chosen = Shelf(settings.home), served(settings)
    places: list[tuple[str, object]] = [*SHIPPED.items(), *((name, shelf.folder / name) for name in shelf.names())]
    places += [place for place in chosen.items() if place not in places]
    return [_line(shelf, name, place, chosen.get(name) == place) for name, place in places]


def _line(shelf: Shelf, name: str, place: object, is_served: bool) -> Line:
    path = Path(str(place))
    if place == "shipped":
        return Line(name, "shipped", None, "shipped", READY, is_served)
    if path.parent != shelf.folder:
        return Line(name, "elsewhere", None, str(path), READY if path.exists() else "there is nothing", is_served)
    try:
        entry = shelf.entry(name)
    except ShelfError as error:
        return Line(name, "unusable", None, str(path), str(error), is_served)
    state = "; ".join(entry.problems()) or READY
    return Line(name, kind(entry), entry.size, str(entry.source.path), state, is_served)


def kind(entry: Entry) -> str:
    """`folder` or `file`, and whether it is only linked to."""
    return ("folder" if entry.source.path.is_dir() else "file") + (", linked" if entry.linked else "")


def as_table(found: Sequence[Line]) -> list[str]:
    """Aligned columns, the widths of what is in them."""
    rows = [("name", "kind", "size", "served", "state", "path")]
    rows += [
        (line.name, line.kind, _sized(line.bytes), "yes" if line.served else "no", line.state, line.path)
        for line in found
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _sized(count: int | None) -> str:
    return "-" if count is None else size(count)


def size(count: int) -> str:
    """Bytes for people: `4.27 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} bytes"


def inspection_as_text(found: Inspection) -> list[str]:
    """One line per fact; what cannot be told is left out."""
    facts: Mapping[str, object] = {
        "path": found.path,
        "layout": found.layout,
        "kind": found.kind,
        "size": None if found.size is None else f"{found.size} pixels a side",
        "prediction": found.prediction,
        "ends in noise": _yes(found.zero_snr),
        "U-Net takes": None if found.in_channels is None else f"{found.in_channels} channels",
        "averaged": _yes(found.ema),
    }
    rows = [(name, str(fact)) for name, fact in facts.items() if fact is not None]
    rows += [(part.component.replace("_", " "), _part(asdict(part))) for part in found.parts]
    rows += [("loadable", "yes" if not found.problems else "no")] + [("problem", problem) for problem in found.problems]
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {text}" for name, text in rows]


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _part(part: Mapping[str, Any]) -> str:
    counts = part["dtypes"].items()
    dtypes = ", ".join(f"{count} {dtype}" if len(counts) > 1 else dtype for dtype, count in counts)
    return (
        f"{part['tensors']} tensors, {part['parameters'] / 1e6:.4g} M numbers, {size(part['nbytes'])}, {dtypes}, "
        f"{part['naming']} names"
    )


def inspection_as_json(found: Inspection) -> dict[str, Any]:
    """Every field; paths as text, `loadable` beside the problems."""
    fields = asdict(found) | {"path": str(found.path), "problems": list(found.problems)}
    fields["parts"] = [part | {"file": str(part["file"]), "dtypes": dict(part["dtypes"])} for part in fields["parts"]]
    return fields | {"loadable": not found.problems}


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar over bytes on a terminal, silence elsewhere. It appears with the first bytes, when the total is known."""
    bars: list[Any] = []

    def seen(read: int, total: int) -> None:
        if not bars:
            bars.append(click.progressbar(length=total, label=label, file=sys.stderr).__enter__())
        bars[0].update(read)

    try:
        yield seen if sys.stderr.isatty() else lambda read, total: None
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)
