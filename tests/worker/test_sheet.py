"""The contact sheet of the demo."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from worker.sheet import CELL, COLUMNS, MARGIN, PAPER, Print, contact_sheet


def png(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_every_picture_stands_in_its_cell_in_order(tmp_path: Path) -> None:
    colours = [(40 * number, 255 - 40 * number, 7) for number in range(COLUMNS + 1)]
    sizes = [(96, 96), (128, 96), (96, 128), (64, 64), (512, 512)]
    prints = [Print(png(colour, size), "a star", "euler") for colour, size in zip(colours, sizes, strict=True)]
    contact_sheet(prints, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as opened:
        sheet = np.asarray(opened)
    middle = MARGIN + CELL // 2
    for column in range(COLUMNS):
        assert tuple(sheet[middle, middle + column * (CELL + MARGIN)]) == colours[column]
    below = sheet[sheet.shape[0] // 2 + MARGIN :, : MARGIN + CELL]
    assert (below == colours[COLUMNS]).all(axis=2).any()
    assert tuple(sheet[0, 0]) == PAPER
