"""A contact sheet: all pictures in a grid, each with its caption."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN, COLUMNS = 256, 16, 4
LINE, LINES, WRAP = 15, 4, 38  # of captions: pixels, lines, characters
PAPER, INK, FAINT = (24, 24, 28), (240, 240, 240), (150, 150, 160)


@dataclass(frozen=True, slots=True)
class Print:
    """One picture (PNG bytes) with its caption: what was asked for, and how."""

    data: bytes
    title: str
    details: str


def contact_sheet(prints: Sequence[Print], path: Path, *, columns: int = COLUMNS) -> None:
    """Write ``prints``, in order, as one PNG at ``path``; each is enlarged by whole pixels where it fits its cell."""
    rows = -(-len(prints) // columns)
    width = columns * (CELL + MARGIN) + MARGIN
    height = rows * (CELL + LINE * LINES + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    for number, item in enumerate(prints):
        row, column = divmod(number, columns)
        _place(sheet, item, MARGIN + column * (CELL + MARGIN), MARGIN + row * (CELL + LINE * LINES + MARGIN))
    sheet.save(path, format="PNG")


def _place(sheet: Image.Image, item: Print, left: int, top: int) -> None:
    with Image.open(io.BytesIO(item.data)) as opened:
        picture = _fitted(opened.convert("RGB"))
    sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    title = [(line, INK) for line in textwrap.wrap(item.title, WRAP)[: LINES - 1]]
    details = [(line, FAINT) for line in textwrap.wrap(item.details, WRAP)]
    for number, (line, colour) in enumerate([*title, *details][:LINES]):
        draw.text((left, top + CELL + 2 + number * LINE), line, fill=colour, font=font)


def _fitted(picture: Image.Image) -> Image.Image:
    largest = max(picture.size)
    if largest > CELL:
        picture.thumbnail((CELL, CELL))
        return picture
    times = CELL // largest
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
