"""Bulk files: txt (a prompt a line), csv (header = fields of the spec), jsonl (an object a line)."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from jobs.errors import BadFile, FieldError, InvalidSpec
from jobs.fields import ALLOWED, PICTURES
from jobs.options import from_words
from jobs.spec import JobSpec, read_spec
from jobs.spec_checks import NEEDS, with_stand_ins

MAX_FILE_BYTES = 512 * 1024 * 1024


class Row(NamedTuple):
    """One row of the file: `spec`, or the `errors` that keep it from being one. `line` counts from 1."""

    line: int
    spec: JobSpec | None
    errors: tuple[FieldError, ...] = ()


class _Raw(NamedTuple):
    line: int
    fields: Mapping[str, Any]
    from_text: bool = True


def read_bulk(path: Path, defaults: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of the file, good and bad. `defaults` are written values for fields that a row does not give.

    Relative paths of pictures are relative to the file. Raises BadFile.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise BadFile(f"{path}: the name must end in {', '.join(_READERS)}; that says how to read it")
    return _checked(reader(path, _read_text(path)), defaults or {}, path.parent)


def _checked(raws: Iterator[_Raw | Row], common: Mapping[str, str], folder: Path) -> Iterator[Row]:
    for raw in raws:
        if isinstance(raw, Row):
            yield raw
            continue
        try:
            yield Row(raw.line, _spec(raw, common, folder))
        except InvalidSpec as error:
            yield Row(raw.line, None, error.errors)


def _spec(raw: _Raw, common: Mapping[str, str], folder: Path) -> JobSpec:
    spec = read_spec(_with_common(raw, common) if common else _own(raw), from_text=raw.from_text)
    # A path among the defaults is relative to where the command was typed, and stays as it is.
    own = [field for field in PICTURES if field in raw.fields and isinstance(getattr(spec, field), Path)]
    return spec.model_copy(update={field: folder / getattr(spec, field) for field in own}) if own else spec


def _own(raw: _Raw) -> Mapping[str, Any]:
    return from_words(raw.fields) if raw.from_text else raw.fields


def _with_common(raw: _Raw, common: Mapping[str, str]) -> Mapping[str, Any]:
    own = _own(raw)
    missing = _fitting({field: value for field, value in common.items() if field not in own}, own)
    # JSON has types, the common options have not: those are read from their written form first.
    return {**(from_words(missing) if raw.from_text else _typed(tuple(missing.items()))), **own}


@lru_cache(maxsize=64)  # rows lack the same few fields, again and again
def _typed(written: tuple[tuple[str, str], ...]) -> Mapping[str, object]:
    spec = read_alone(dict(written)) if written else None
    return {field: getattr(spec, field) for field, _ in written}


def read_alone(common: Mapping[str, str]) -> JobSpec:
    """A spec of these written fields and of what they need, to find their own mistakes. Raises InvalidSpec."""
    return read_spec({"prompt": "-", **with_stand_ins(from_words(common))}, from_text=True)


def _fitting(common: Mapping[str, str], own: Mapping[str, Any]) -> dict[str, str]:
    """The common fields that mean something in this row: a common strength is for the rows that have a picture."""
    kept = dict(common)
    for field in [field for field in NEEDS if field in common]:
        need, row = NEEDS[field], {**from_words(kept), **own}
        if not need.met(row.get(need.of, JobSpec.model_fields[need.of].default)):
            del kept[field]
    return kept


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadFile(f"{path}: larger than {MAX_FILE_BYTES} bytes; split it")
        data = path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadFile(f"{path}: is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadFile(f"{path}: line {line} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise BadFile(f"{path}: has no rows")
    return text


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines: that also cuts at characters which may stand inside a prompt.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if line.strip():
            yield number, line


def _read_txt(path: Path, text: str) -> Iterator[_Raw]:
    for number, line in _lines(text):
        yield _Raw(number, {"prompt": line})


def _read_jsonl(path: Path, text: str) -> Iterator[_Raw | Row]:
    for number, line in _lines(text):
        try:
            fields = _JSON.decode(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield Row(number, None, (FieldError("", f"is no JSON: {reason}"),))
            continue
        if isinstance(fields, dict):
            yield _Raw(number, fields, from_text=False)
        else:
            yield Row(number, None, (FieldError("", 'is no JSON object; write {"prompt": "..."}'),))


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


_JSON = json.JSONDecoder(parse_constant=_no_constant)


def _read_csv(path: Path, text: str) -> Iterator[_Raw | Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = _header(path, next(reader))
        line = reader.line_num + 1
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield _csv_row(line, header, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise BadFile(f"{path}: line {reader.line_num} is no csv: {error}") from None


def _header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    unknown = [name for name in header if name not in ALLOWED]
    if "prompt" not in header or unknown or len(set(header)) != len(header):
        named = f"unknown column {unknown[0]!r}" if unknown else "a column twice, or no column prompt"
        raise BadFile(f"{path}: line 1 has {named}; it must name columns, each once, of: {', '.join(ALLOWED)}")
    return header


def _csv_row(line: int, header: list[str], cells: list[str]) -> _Raw | Row:
    if len(cells) > len(header):
        message = f"has {len(cells)} cells, the header {len(header)}; put quotes around text with commas"
        return Row(line, None, (FieldError("", message),))
    # An empty cell is a field not given.
    return _Raw(line, {name: cell.strip() for name, cell in zip(header, cells, strict=False) if cell.strip()})


_READERS: Mapping[str, Callable[[Path, str], Iterator[_Raw | Row]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
