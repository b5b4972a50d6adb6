"""Init images: what a worker could not use never gets into the queue."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from jobs.errors import InvalidSpec
from jobs.inputs import MAX_BYTES, Inputs, store_input
from jobs.spec import JobSpec
from jobs.storage import DirStorage


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


def test_a_picture_that_many_specs_name_is_looked_at_once(storage: DirStorage, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(drawn())
    looked: list[object] = []

    def store(spec: JobSpec) -> JobSpec:
        looked.append(spec.init_image)
        return store_input(spec, storage)

    inputs = Inputs(store)
    assert {inputs.stored(JobSpec(prompt=text, init_image=good)).input_key for text in "abc"} != {None}
    for _ in range(2):
        with pytest.raises(InvalidSpec, match="cannot read"):
            inputs.stored(JobSpec(prompt="x", init_image=bad))
    assert looked == [good, bad]
