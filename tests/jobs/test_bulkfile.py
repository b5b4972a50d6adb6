"""Bulk files: good rows, bad rows by line, and files that are no bulk files."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bulkfile import Row, read_bulk
from jobs.errors import BadFile
from jobs.spec import JobSpec


def rows(tmp_path: Path, name: str, data: str | bytes, **defaults: str) -> list[Row]:
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_bulk(path, defaults))


def prompts(found: list[Row]) -> list[tuple[int, str]]:
    return [(row.line, row.spec.prompt) for row in found if row.spec]


def test_txt_is_a_prompt_a_line(tmp_path: Path) -> None:
    found = rows(tmp_path, "a.txt", "\ufeffa cat\r\n\n  a dog \u2028 here\n", steps="7")
    assert prompts(found) == [(1, "a cat"), (3, "a dog \u2028 here")]
    assert all(row.spec and row.spec.steps == 7 for row in found)


def test_csv_reads_fields_by_header(tmp_path: Path) -> None:
    text = 'prompt,steps,guidance,seed\n"a cat, sitting",5,none,7\n"two\nlines",,,\n,,,\na dog,0,x,-1\n'
    found = rows(tmp_path, "a.csv", text, steps="9", guidance="3")
    assert found[0].spec == JobSpec(prompt="a cat, sitting", steps=5, guidance=None, seed=7)
    assert found[1].spec == JobSpec(prompt="two lines", steps=9, guidance=3.0)
    assert found[2].line == 6
    assert [error.field for error in found[2].errors] == ["steps", "guidance", "seed"]


def test_jsonl_keeps_types_and_tells_lines(tmp_path: Path) -> None:
    good, bad = '{"prompt": "a", "steps": 3}', '{"prompt": "b", "steps": "3"}'
    text = f'{good}\n\n{bad}\n[1]\n{{"prompt": \n{{"prompt": "c", "guidance": NaN}}\n'
    found = rows(tmp_path, "a.jsonl", text, seed="5", guidance="none")
    assert found[0].spec == JobSpec(prompt="a", steps=3, seed=5, guidance=None)
    assert [(row.line, row.errors[0].field) for row in found[1:]] == [(3, "steps"), (4, ""), (5, ""), (6, "")]


def test_a_picture_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    text = '{"prompt": "a", "init_image": "b.png"}\n{"prompt": "a"}\n{"prompt": "a", "init_image": "/c.png"}\n'
    found = rows(tmp_path, "a.jsonl", text, strength="0.5")
    assert [row.spec and (row.spec.init_image, row.spec.strength) for row in found] == [
        (tmp_path / "b.png", 0.5),
        (None, 0.75),  # a common strength is meant for the rows that have a picture
        (Path("/c.png"), 0.5),
    ]
    (row,) = rows(tmp_path, "b.txt", "a\n", init_image="here.png")
    assert row.spec is not None
    assert row.spec.init_image == Path("here.png")  # typed on the command line: relative to where it was typed


def test_a_common_option_is_for_the_rows_that_can_use_it(tmp_path: Path) -> None:
    common = {
        "mask": "m.png",
        "mask_blur": "4",
        "upscale_steps": "9",
        "eta": "0.5",
        "guidance_rescale": "0.7",
        "resize": "crop",
    }
    texts = {
        "a.jsonl": '{"prompt": "a", "init_image": "b.png", "sampler": "DDIM"}\n{"prompt": "a", "upscale": 2}\n'
        '{"prompt": "a", "guidance": null}\n',
        "a.csv": "prompt,init_image,sampler,upscale,guidance\na,b.png,DDIM,,\na,,,2,\na,,,,none\n",
    }
    for name, text in texts.items():
        assert [row.spec for row in rows(tmp_path, name, text, **common)] == [
            JobSpec(
                prompt="a",
                init_image=tmp_path / "b.png",
                mask=Path("m.png"),
                mask_blur=4.0,
                resize="crop",
                sampler="ddim",
                eta=0.5,
                guidance_rescale=0.7,
            ),
            JobSpec(prompt="a", upscale=2.0, upscale_steps=9, guidance_rescale=0.7),
            JobSpec(prompt="a", guidance=None),
        ]


def test_a_common_option_is_not_for_a_row_that_says_none(tmp_path: Path) -> None:
    common = {"strength": "0.5", "upscale_strength": "0.7", "init_image": "b.png", "upscale": "2"}
    texts = {
        "a.csv": "prompt,init_image,upscale\na,none,none\n",
        "a.jsonl": '{"prompt": "a", "init_image": null, "upscale": null}\n',
    }
    for name, text in texts.items():
        assert [row.spec for row in rows(tmp_path, name, text, **common)] == [JobSpec(prompt="a")]


def test_a_number_beyond_all_others_is_a_bad_row_whatever_is_common(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "a.jsonl", '{"prompt": "a", "guidance": 1' + 400 * "0" + "}\n", guidance_rescale="0.5")
    assert [error.field for error in row.errors] == ["guidance"]


def test_a_mask_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    text = '{"prompt": "a", "init_image": "/b.png", "mask": "m/m.png"}\n'
    (row,) = rows(tmp_path, "a.jsonl", text, mask="other.png", mask_blur="4")
    assert row.spec is not None and row.spec.mask_blur == 4
    assert (row.spec.init_image, row.spec.mask) == (Path("/b.png"), tmp_path / "m" / "m.png")


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.txt", b"", "no rows"),
        ("a.txt", b"\xef\xbb\xbf \n \n", "no rows"),
        ("a.txt", b"fine\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("a.txt", "a".encode("utf-16"), "UTF-16"),
        ("a.xlsx", b"a", "must end in .txt, .csv, .jsonl"),
        ("a.csv", b"prompt,stepz\na,3\n", "unknown column 'stepz'"),
        ("a.csv", b"steps,seed\n1,3\n", "no column prompt"),
        ("a.csv", b"prompt,prompt\na,b\n", "a column twice"),
        ("a.csv", b'prompt\n"never closed\n', "is no csv"),
    ],
)
def test_a_file_that_is_no_bulk_file_is_one_sentence(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    with pytest.raises(BadFile, match=sentence) as caught:
        rows(tmp_path, name, data)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_told(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("missing.txt", "folder.txt"):
        with pytest.raises(BadFile, match="cannot be read"):
            list(read_bulk(tmp_path / name))


def test_a_csv_row_with_too_many_cells_is_bad(tmp_path: Path) -> None:
    (row,) = rows(tmp_path, "a.csv", "prompt,steps\na cat, sitting,5\n")
    assert "put quotes" in str(row.errors[0])
