"""What leaves in a picture: the parameters of its job, or nothing; and nothing of the picture it came from."""

from __future__ import annotations

import getpass
import io
import json
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import Client, Settings, State
from jobs.fields import ALLOWED
from jobs.spec import JobSpec
from sd_engine.pictures import read_picture
from tests.integration.processes import PATIENCE_S, fake_worker, tail
from worker.encode import encode

PIXELS = np.zeros((64, 96, 3), dtype=np.uint8)


def chunks(png: bytes) -> list[tuple[str, bytes]]:
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8].decode(), png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def test_a_picture_carries_its_parameters_and_no_other_text() -> None:
    kinds = chunks(encode(PIXELS, JobSpec(prompt="a 星"), 7).data)
    assert {kind for kind, _ in kinds} <= {"IHDR", "IDAT", "IEND", "iTXt", "tEXt"}
    texts = [data.split(b"\0")[0] for kind, data in kinds if kind in ("iTXt", "tEXt", "zTXt")]
    assert sorted(texts) == [b"nightshift", b"parameters"]
    facts = json.loads(Image.open(io.BytesIO(encode(PIXELS, JobSpec(prompt="a"), 7).data)).info["nightshift"])
    assert set(facts) <= set(ALLOWED), "only fields of the spec"


def test_without_parameters_a_picture_is_pixels_alone() -> None:
    png = encode(PIXELS, JobSpec(prompt="a secret"), 7, parameters=False).data
    assert {kind for kind, _ in chunks(png)} == {"IHDR", "IDAT", "IEND"}
    assert b"secret" not in png


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_operator_chooses_whether_pictures_carry_parameters(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_PNG_PARAMETERS", value)
    log = tmp_path / "worker.log"
    source = with_gps()
    with Client(settings) as client:
        views = [client.submit("canary prompt", steps=1), client.submit("from a picture", steps=2, init_image=source)]
        with fake_worker(settings, log, step_s=0.0, concurrency=2, until_empty=True) as worker:
            assert worker.wait(PATIENCE_S) == 0, tail(log)
        for view in views:
            assert client.get(view.id).state is State.succeeded
            png = client.image_bytes(view.id)
            texts = [data for kind, data in chunks(png) if kind.endswith("Xt")]
            assert len(texts) == (2 if value == "1" else 0)
            assert not [kind for kind, _ in chunks(png) if kind in ("eXIf", "iCCP", "zTXt", "tIME", "pHYs")]
            told = b"".join(texts)
            own = {socket.gethostname(), getpass.getuser(), str(settings.home), str(view.id), str(os.getpid()), "GPS"}
            assert not [word for word in own if len(word) > 3 and word.encode() in told]


def with_gps() -> bytes:
    """A JPEG as a phone makes it: where, with what and by whom."""
    exif = Image.Exif()
    exif[0x010F], exif[0x013B] = "Maker", "Photographer"
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 17.0)})
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(buffer, "JPEG", exif=exif, comment=b"GPS comment")
    return buffer.getvalue()


def test_of_a_picture_only_its_pixels_reach_the_engine() -> None:
    source = with_gps()
    with Image.open(io.BytesIO(source)) as opened:
        assert dict(opened.getexif().get_ifd(0x8825)), "the picture says where it was taken"
    pixels = read_picture(source)
    assert type(pixels) is np.ndarray and pixels.shape == (64, 96, 3)
