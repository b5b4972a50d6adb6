"""A picture from outside costs what its size lets expect, whatever is in it, and only three decoders ever see it."""

from __future__ import annotations

import io
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.errors import InvalidSpec
from jobs.inputs import MAX_BYTES, MAX_PIXELS, look_at
from jobs.picture_files import MAX_PIECES, MAX_SCANS, too_costly
from jobs.spec import JobSpec
from jobs.storage import DirStorage
from sd_engine.errors import InvalidRequest
from sd_engine.pictures import read_mask, read_picture
from worker.reasons import Unusable
from worker.translate import to_requests

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIDE = 5656
"""The largest square that is allowed."""


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, pixels: bytes | None = None, mode: int = 2, depth: int = 8) -> bytes:
    """A PNG of zeros with these chunks before its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, mode, 0, 0, 0))
    line = 1 + width * {2: 3, 6: 4}[mode] * depth // 8
    data = zlib.compress(bytes(line * height), 9) if pixels is None else pixels
    return SIGNATURE + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def drawn(kind: str, size: tuple[int, int] = (96, 64), mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_of_many_scans(count: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A progressive JPEG whose last scan is repeated: 53 bytes each, and each visits every pixel."""
    data = drawn("JPEG", size, "L", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def animated(kind: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", (64, 64), (number % 256, number // 256, 0)) for number in range(frames)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


JPEG = drawn("JPEG")
BOMB = zlib.compress(bytes(200_000_000), 9)
"""200 KB that become 200 MB."""
REFUSED: dict[str, Callable[[], bytes]] = {
    "50,000 x 50,000": lambda: png(50_000, 50_000, pixels=b""),
    "just above the pixels": lambda: png(SIDE + 8, SIDE + 8, pixels=b""),
    "one byte too many": lambda: bytes(MAX_BYTES + 1),
    "zTXt bomb": lambda: png(96, 64, chunk(b"zTXt", b"k\0\0" + BOMB)),
    "iTXt bomb": lambda: png(96, 64, chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB)),
    "many small zTXt bombs": lambda: png(96, 64, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1_000_000), 9))] * 80),
    "colour profile bomb": lambda: png(96, 64, chunk(b"iCCP", b"k\0\0" + BOMB)),
    "a million chunks": lambda: png(96, 64, chunk(b"abCd", b"") * 1_000_000),
    "a million segments": lambda: JPEG[:2] + b"\xff\xfe\0\2" * 1_000_000 + JPEG[2:],
    "a million filling bytes": lambda: JPEG[:2] + b"\xff" * 1_000_000 + JPEG[2:],
    "2000 scans": lambda: jpeg_of_many_scans(2000),
    "animated PNG": lambda: animated("PNG", 300),
    "animated WebP": lambda: animated("WEBP", 300),
    "GIF": lambda: drawn("GIF"),
    "TIFF": lambda: drawn("TIFF"),
    "BMP": lambda: drawn("BMP"),
    "EPS": lambda: drawn("EPS"),
    "FITS": lambda: b"SIMPLE  =                    T".ljust(2880),
    "truncated JPEG": lambda: drawn("JPEG", (512, 512))[:-900],
    "truncated PNG": lambda: drawn("PNG", (512, 512))[:-40],
    "no picture": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_made_to_harm_is_refused_in_a_moment_and_in_little_memory(name: str) -> None:
    data = REFUSED[name]()
    before, started = memory_mb(), time.thread_time()
    with pytest.raises(InvalidSpec, match=r"^init_image: .* allowed"):
        look_at("init_image", data)
    assert time.thread_time() - started < 2.0, "CPU time of this thread, so that a busy machine changes nothing"
    assert memory_mb() - before < 300


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(lambda: png(SIDE, SIDE, mode=6, depth=16), id="PNG of sixteen bits"),
        pytest.param(lambda: jpeg_of_many_scans(MAX_SCANS - 6), id="JPEG of the most scans"),
        pytest.param(lambda: png(96, 64, chunk(b"abCd", b"") * (MAX_PIECES - 3)), id="PNG of the most chunks"),
    ],
)
def test_the_largest_picture_that_is_allowed_costs_no_more_than_some_seconds(data: Callable[[], bytes]) -> None:
    made = data()
    before, started = memory_mb(), time.thread_time()
    look_at("init_image", made)
    assert time.thread_time() - started < 8.0
    assert memory_mb() - before < 1000


def test_real_files_are_far_from_the_limits_of_structure() -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (1500, 2000, 3), dtype=np.uint8))
    for kind, options in (("JPEG", {"progressive": True, "quality": 98}), ("JPEG", {}), ("PNG", {}), ("WEBP", {})):
        buffer = io.BytesIO()
        noise.save(buffer, kind, exif=Image.Exif(), icc_profile=bytes(300_000), **options)
        assert too_costly(buffer.getvalue()) == ""


@pytest.mark.parametrize("name", ["2000 scans", "a million chunks", "50,000 x 50,000", "EPS", "GIF", "no picture"])
def test_a_worker_refuses_it_too_although_somebody_put_it_into_the_storage(tmp_path: Path, name: str) -> None:
    storage, key = DirStorage(tmp_path / "storage"), f"inputs/{'0a' * 32}.png"
    storage.put(key, REFUSED[name](), "image/png")
    started = time.thread_time()
    with pytest.raises((Unusable, InvalidRequest), match="init_image"):
        to_requests(JobSpec(prompt="x", seed=1, init_image=key), storage)
    assert time.thread_time() - started < 2.0


@pytest.mark.parametrize("read", [read_picture, read_mask])
@pytest.mark.parametrize("name", ["50,000 x 50,000", "zTXt bomb", "EPS", "TIFF"])
def test_the_engine_itself_refuses_what_is_too_large_or_of_another_kind(
    name: str, read: Callable[[bytes], object]
) -> None:
    with pytest.raises(InvalidRequest):
        read(REFUSED[name]())


STARTED = """
import sys
from pathlib import Path
programs = []
sys.addaudithook(lambda event, arguments: programs.append(event) if event in
    ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec", "socket.connect") else None)
from jobs.errors import InvalidSpec
from jobs.inputs import look_at
for path in sys.argv[1:]:
    try:
        look_at("init_image", Path(path).read_bytes())
    except InvalidSpec:
        print("refused", programs)
"""


def test_postscript_starts_no_program(tmp_path: Path) -> None:
    """Pillow's decoder of EPS would start Ghostscript; it is never asked."""
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n"
    files = [drawn("EPS"), header + b"(%pipe%touch canary) (w) file\n", b"\xc5\xd0\xd3\xc6" + bytes(60)]
    for number, data in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(data)
    command = [sys.executable, "-c", STARTED, *(str(tmp_path / f"{number}.png") for number in range(3))]
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    found_first = dict(os.environ) | {"PATH": f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, env=found_first, capture_output=True, text=True, timeout=60)
    assert not (tmp_path / "started").exists()
    assert result.stdout.splitlines() == ["refused []"] * 3, result.stderr


def test_a_warning_of_pillow_about_pixels_is_an_error_to_us() -> None:
    """Pillow only warns between its limit and twice that; ours is lower, and does not depend on it."""
    assert (Image.MAX_IMAGE_PIXELS or 0) > MAX_PIXELS
    with pytest.raises(InvalidSpec, match="pixels"):
        look_at("init_image", png(11_000, 10_000, pixels=b""))


def test_odd_exif_does_not_fill_the_log(recwarn: pytest.WarningsRecorder) -> None:
    """Pillow warns once for every tag that it cannot read; a file has room for five thousand."""
    tags = b"".join(struct.pack("<HHII", tag + 1, 1, 65_000, 8) for tag in range(5000))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 5000) + tags + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    look_at("init_image", JPEG[:2] + segment + JPEG[2:])
    assert len(recwarn) == 0
