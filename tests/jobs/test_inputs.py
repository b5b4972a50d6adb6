"""Init images: what a worker could not use never gets into the queue."""

from __future__ import annotations

import io
import os
import struct
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.errors import InvalidSpec
from jobs.inputs import MAX_BYTES, Inputs
from jobs.spec import JobSpec
from jobs.storage import DirStorage, Storage, Stored


def drawn(kind: str = "PNG", size: tuple[int, int] = (96, 64), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes whose header promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def store_input(spec: JobSpec, storage: Storage) -> JobSpec:
    return Inputs(lambda: storage).stored(spec)


ANIMATION = drawn("WEBP", save_all=True, append_images=[Image.new("RGB", (96, 64), "blue")])


@pytest.fixture
def storage(tmp_path: Path) -> DirStorage:
    return DirStorage(tmp_path / "storage")


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_a_picture_is_stored_by_its_content(storage: DirStorage, tmp_path: Path, kind: str, ending: str) -> None:
    data = drawn(kind)
    (tmp_path / "picture.anything").write_bytes(data)
    from_bytes = store_input(JobSpec(prompt="x", init_image=data), storage)
    from_path = store_input(JobSpec(prompt="x", init_image=tmp_path / "picture.anything"), storage)
    assert from_bytes == from_path == store_input(from_path, storage)
    assert str(from_bytes.input_key).endswith(f".{ending}")
    assert storage.get(str(from_bytes.input_key)) == data


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00" * 100, id="noise"),
        pytest.param(drawn("GIF"), id="gif"),
        pytest.param(drawn("TIFF"), id="tiff"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n", id="eps"),
        pytest.param(drawn(size=(512, 512))[:-40], id="truncated png"),
        pytest.param(drawn("JPEG", (512, 512))[:-900], id="truncated jpeg"),
        pytest.param(png_that_claims(50_000, 50_000), id="bomb"),
        pytest.param(png_that_claims(11_000, 10_000), id="bomb that only warns"),
        pytest.param(png_that_claims(7_000, 7_000), id="bomb that Pillow lets pass"),
        pytest.param(ANIMATION, id="animation"),
        pytest.param(drawn(size=(3000, 100)), id="too large for a job without size"),
        pytest.param(drawn(size=(32, 32)), id="too small for a job without size"),
        pytest.param(b"x" * (MAX_BYTES + 1), id="too many bytes"),
    ],
)
def test_what_no_worker_could_use_is_refused(storage: DirStorage, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(InvalidSpec, match="allowed") as caught:
        store_input(JobSpec(prompt="x", init_image=data), storage)
    assert [error.field for error in caught.value.errors] == ["init_image"]
    assert list((tmp_path / "storage").iterdir()) == []


@pytest.mark.parametrize(("width", "height"), [(50_000, 50_000), (11_000, 10_000), (7_000, 7_000)])
def test_whoever_has_too_many_pixels_is_told_so(storage: DirStorage, width: int, height: int) -> None:
    """Not that the file cannot be decoded, which Pillow says of the largest: it would be sent again."""
    with pytest.raises(InvalidSpec, match=r"^mask: has .* pixels.* allowed: at most 32000000 in all$"):
        store_input(JobSpec(prompt="x", init_image=drawn(), mask=png_that_claims(width, height)), storage)


def test_a_size_of_its_own_frees_the_job_from_the_pictures(storage: DirStorage) -> None:
    spec = JobSpec(prompt="x", init_image=drawn(size=(3000, 100)), width=96, height=96)
    assert store_input(spec, storage).input_key is not None


def test_a_path_that_cannot_be_read_is_told(storage: DirStorage, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.png", tmp_path, Path("nul\0.png")):
        with pytest.raises(InvalidSpec, match="cannot read"):
            store_input(JobSpec(prompt="x", init_image=path), storage)


def test_a_key_without_its_object_is_told(storage: DirStorage) -> None:
    with pytest.raises(InvalidSpec, match="not in the storage"):
        store_input(JobSpec(prompt="x", init_image=f"inputs/{'0' * 64}.png"), storage)


class Watched(DirStorage):
    """Counts the questions."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def look(self, key: str) -> Stored:
        self.asked.append(key)
        return super().look(key)


def test_a_picture_that_many_specs_name_is_looked_at_once(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(drawn())
    storage = Watched(tmp_path / "storage")
    inputs = Inputs(lambda: storage)
    first = inputs.stored(JobSpec(prompt="a", init_image=good))
    good.unlink()
    assert inputs.stored(JobSpec(prompt="b", init_image=good)).input_key == first.input_key
    for _ in range(2):
        with pytest.raises(InvalidSpec, match="cannot read"):
            inputs.stored(JobSpec(prompt="x", init_image=bad))
        bad.write_bytes(drawn())
    assert inputs.stored(first) == first == inputs.stored(first)
    assert storage.asked == [first.input_key] * 2


def test_a_picture_stored_long_ago_is_stored_again_so_that_no_prune_takes_it_from_the_job(tmp_path: Path) -> None:
    storage = DirStorage(tmp_path / "storage")
    key = store_input(JobSpec(prompt="a", init_image=drawn()), storage).input_key
    assert key is not None
    for again in (JobSpec(prompt="a", init_image=drawn()), JobSpec(prompt="a", init_image=key)):
        os.utime(tmp_path / "storage" / key, (0, 0))
        assert store_input(again, storage).input_key == key
        assert storage.look(key).modified > datetime.now(UTC) - timedelta(minutes=5)
        assert storage.get(key) == drawn()


def test_a_picture_in_use_is_still_held_to_the_size_of_each_spec(storage: DirStorage, tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    path.write_bytes(drawn(size=(3000, 100)))
    inputs = Inputs(lambda: storage)
    inputs.stored(JobSpec(prompt="x", init_image=path, width=96, height=96))
    with pytest.raises(InvalidSpec, match="give width and height"):
        inputs.stored(JobSpec(prompt="x", init_image=path, height=96))
    inputs.stored(JobSpec(prompt="x", init_image=path, width=96))


def turned(size: tuple[int, int], orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return drawn(kind, size, exif=exif)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_has_the_size_that_is_seen(storage: DirStorage, kind: str) -> None:
    mask = drawn(size=(64, 96))
    lying, standing = turned((96, 64), 1, kind), turned((96, 64), 6, kind)
    assert store_input(JobSpec(prompt="x", init_image=standing, mask=mask), storage).mask_key is not None
    with pytest.raises(InvalidSpec, match="mask: has 64 x 96 pixels; allowed: those of its init_image, 96 x 64"):
        store_input(JobSpec(prompt="x", init_image=lying, mask=mask), storage)
    kept = store_input(JobSpec(prompt="x", init_image=standing), storage).input_key
    assert storage.get(str(kept)) == standing  # as it came


def test_an_orientation_counts_before_the_size_is_judged(storage: DirStorage) -> None:
    with pytest.raises(InvalidSpec, match="has 64 x 3000 pixels"):
        store_input(JobSpec(prompt="x", init_image=turned((3000, 64), 8)), storage)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "I;16"])
def test_a_mask_of_any_mode_is_stored(storage: DirStorage, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (96, 64)).save(buffer, "PNG")
    spec = store_input(JobSpec(prompt="x", init_image=drawn(), mask=buffer.getvalue()), storage)
    assert spec.mask_key is not None and storage.get(spec.mask_key) == buffer.getvalue()


@pytest.mark.parametrize("mask", [b"", drawn("GIF"), ANIMATION, drawn(size=(64, 64)), Path("/missing.png"), b"x" * 100])
def test_a_mask_that_no_worker_could_use_is_refused_by_its_name(storage: DirStorage, mask: object) -> None:
    with pytest.raises(InvalidSpec) as caught:
        store_input(JobSpec(prompt="x", init_image=drawn(), mask=mask), storage)
    assert [error.field for error in caught.value.errors] == ["mask"]


def test_a_mask_can_be_given_for_a_picture_that_is_stored(storage: DirStorage) -> None:
    key = store_input(JobSpec(prompt="x", init_image=drawn()), storage).input_key
    assert store_input(JobSpec(prompt="x", init_image=key, mask=drawn()), storage).input_key == key
    with pytest.raises(InvalidSpec, match="mask: has 64 x 64"):
        store_input(JobSpec(prompt="x", init_image=key, mask=drawn(size=(64, 64))), storage)


@pytest.mark.parametrize(
    ("fields", "size", "field"),
    [
        ({"upscale": 3.0}, (1400, 64), "upscale"),
        ({"images": 64, "steps": 200}, (2048, 2048), "images"),
    ],
)
def test_what_is_too_much_of_this_picture_is_refused(
    storage: DirStorage, fields: dict[str, Any], size: tuple[int, int], field: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        store_input(JobSpec(prompt="x", init_image=drawn(size=size), **fields), storage)
    assert [error.field for error in caught.value.errors] == [field]


def test_the_picture_of_a_phone_that_has_a_second_one_inside_is_a_jpeg(storage: DirStorage) -> None:
    data = drawn("MPO", save_all=True, append_images=[Image.new("RGB", (48, 32), "blue")])
    assert str(store_input(JobSpec(prompt="x", init_image=data), storage).input_key).endswith(".jpg")
