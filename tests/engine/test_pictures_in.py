"""Pictures in: any size and form is brought to what is drawn, as the reference brings it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sd_engine import pictures
from sd_engine.errors import InvalidRequest
from sd_engine.pictures import fit, fit_mask, on_white, read_mask, read_picture
from sd_engine.request import Resize

Pixels = npt.NDArray[np.uint8]

REFERENCE: dict[Resize, str] = {"stretch": "default", "crop": "crop", "fill": "fill"}
ORIENTATION = 0x0112
TOP_HALF = np.repeat(np.array([[200], [0]], np.uint8), [12, 12], axis=0).repeat(32, axis=1)


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


@pytest.mark.parametrize("resize", REFERENCE)
@pytest.mark.parametrize("shape", [(64, 104), (37, 90), (101, 33), (200, 64), (8, 300)])
def test_a_picture_and_its_mask_are_resized_exactly_as_the_reference_resizes_them(
    shape: tuple[int, int], resize: Resize
) -> None:
    theirs: Any = VaeImageProcessor(vae_scale_factor=8)
    masks: Any = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    image, mask = noise(*shape, 3), noise(*shape)
    for height, width in ((64, 64), (64, 104), (136, 72)):
        wanted = theirs.resize(Image.fromarray(image), height, width, REFERENCE[resize])
        assert np.array_equal(fit(image, height, width, resize), np.asarray(wanted))
        anew = masks.preprocess(Image.fromarray(mask), height, width, REFERENCE[resize])[0, 0].bool().numpy()
        assert np.array_equal(fit_mask(mask, height, width, resize) >= 128, anew)


def test_stretch_changes_the_shape_crop_loses_the_edges_and_fill_loses_nothing() -> None:
    bands = np.repeat(np.array([250, 100, 20], np.uint8), [16, 64, 16])[None, :, None].repeat(64, 0).repeat(3, 2)
    first_row: dict[Resize, list[int]] = {resize: fit(bands, 64, 64, resize)[32, :, 0].tolist() for resize in REFERENCE}
    assert first_row["stretch"][2] == 250 and first_row["stretch"][-3] == 20
    assert set(first_row["crop"][1:-1]) == {100}
    assert first_row["fill"][2] == 250 and first_row["fill"][-3] == 20
    assert fit(bands, 64, 64, "fill")[0, 32, 0] == 100  # above the picture its edge goes on


@pytest.mark.parametrize("resize", REFERENCE)
def test_a_picture_of_the_right_size_is_left_alone(resize: Resize) -> None:
    assert np.array_equal(fit(noise(64, 72, 3), 64, 72, resize), noise(64, 72, 3))


@pytest.mark.parametrize("resize", REFERENCE)
@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (1, 1)])
def test_a_picture_one_pixel_thin_is_no_error(shape: tuple[int, int], resize: Resize) -> None:
    """The reference fails on these: the short side is rounded down to no pixel at all."""
    assert fit(noise(*shape, 3), 64, 72, resize).shape == (64, 72, 3)
    assert fit_mask(noise(*shape), 64, 72, resize).shape == (64, 72)


def test_transparent_parts_become_white_whatever_colour_is_under_them() -> None:
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., 0] = 255
    image[:4, :, 3], image[4:, :, 3] = 0, 255
    assert (on_white(image)[:4] == 255).all()
    assert (on_white(image)[4:] == (255, 0, 0)).all()
    image[..., 3] = 128
    assert np.abs(on_white(image)[0, 0].astype(int) - (255, 127, 127)).max() <= 1
    assert fit(image, 64, 64).shape == (64, 64, 3)


def test_a_blur_has_the_deviation_asked_for() -> None:
    edge = np.where(np.arange(200) < 100, 0, 255).astype(np.uint8)[None].repeat(64, 0)
    blurred = fit_mask(edge, 64, 200, blur=8.0)[32] / 255
    assert np.array_equal(fit_mask(edge, 64, 200), edge)
    # The derivative of a blurred edge is the Gaussian itself. Pillow's is three box filters, and has 256 levels.
    weights = np.diff(blurred)
    middle = (weights * np.arange(199)).sum()
    assert abs(np.sqrt((weights * (np.arange(199) - middle) ** 2).sum()) - 8.0) < 0.3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_in_the_file_is_honoured(kind: str, orientation: int) -> None:
    upright = Image.fromarray(TOP_HALF)
    turned = upright if orientation < 2 else _turn(upright, orientation)
    data = file(turned.convert("RGB"), kind, exif=exif(orientation))
    read = read_picture(data)
    assert read.shape == (24, 32, 3)
    # JPEG and WebP are lossy, along the edge most.
    assert np.abs(read[..., 0].astype(int) - TOP_HALF).mean() < 8
    assert read_mask(data).shape == (24, 32)


def _turn(picture: Image.Image, orientation: int) -> Image.Image:
    """What a camera held that way stores: `ImageOps.exif_transpose` undone."""
    for way in Image.Transpose:
        stored = picture.transpose(way)
        stored.getexif()[ORIENTATION] = orientation
        if np.array_equal(np.asarray(ImageOps.exif_transpose(stored)), np.asarray(picture)):
            return picture.transpose(way)
    raise AssertionError(orientation)


GREY = Image.fromarray(TOP_HALF)
FORMS = {
    "bits": GREY.convert("1", dither=Image.Dither.NONE),
    "grey": GREY,
    "sixteen bits": Image.fromarray(TOP_HALF.astype(np.uint16) * 257),
    "palette": GREY.convert("RGB").quantize(2),
    **{mode: GREY.convert("RGB").convert(mode) for mode in ("RGB", "CMYK", "LA", "RGBA")},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pixels_is_read_as_it_looks(form: str) -> None:
    read = read_picture(file(FORMS[form], "JPEG" if form == "CMYK" else "PNG"))
    assert read.shape == (24, 32, 4 if form in ("LA", "RGBA") else 3)
    assert read.dtype == np.uint8
    wanted = np.where(TOP_HALF, 255, 0) if form == "bits" else TOP_HALF
    allowed = 4 if form == "CMYK" else 0  # a JPEG is lossy
    assert np.abs(read[2:10, :, :3].astype(int) - wanted[2:10, :, None]).max() <= allowed


def test_a_palette_with_a_transparent_colour_keeps_it() -> None:
    picture = Image.fromarray(TOP_HALF).convert("P")
    read = read_picture(file(picture, transparency=int(np.asarray(picture)[0, 0])))
    assert read.shape == (24, 32, 4)
    assert (read[0, 0, 3], read[-1, -1, 3]) == (0, 255)


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_what_is_transparent_of_a_mask_is_kept_however_bright_it_is(mode: str) -> None:
    bright = Image.fromarray(TOP_HALF + 55)  # 255 above, 55 below
    if mode == "P":
        picture = bright.convert("P")
        data = file(picture, transparency=int(np.asarray(picture)[0, 0]))
    else:
        picture = bright.convert(mode)
        picture.putalpha(Image.fromarray(np.where(TOP_HALF, 0, 255).astype(np.uint8)))
        data = file(picture)
    mask = read_mask(data)
    assert not mask[:12].any() and (np.abs(mask[12:].astype(int) - 55) <= 8).all()  # a palette has few greys


def test_a_picture_is_read_from_a_path_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file(Image.fromarray(noise(8, 9, 3))))
    assert np.array_equal(read_picture(tmp_path / "a.png"), noise(8, 9, 3))


@pytest.mark.parametrize(
    ("data", "sentence"),
    {
        b"": r"init_image='0 bytes of something else' is not allowed: one of PNG, JPEG, WEBP",
        b"GIF89a, or not": "something else",
        file(Image.fromarray(noise(16, 16, 3)))[:300]: "cannot be decoded .*; send the file again",
        file(Image.fromarray(noise(16, 16, 3)), "TIFF"): "something else",
    }.items(),
)
def test_what_is_no_picture_is_refused_in_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        read_picture(data)


def test_a_refusal_names_the_field_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^mask='.*none.png' is not allowed: a file that can be read"):
        read_mask(tmp_path / "none.png")
    with pytest.raises(InvalidRequest, match=r"^control_image="):
        read_picture(b"", "control_image")


def test_a_picture_too_large_in_bytes_or_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = file(Image.new("RGB", (100, 100)))
    monkeypatch.setattr(pictures, "MAX_PIXELS", 9_999)
    with pytest.raises(InvalidRequest, match=r"100 x 100 pixels.*at most 9999"):
        read_picture(data)
    monkeypatch.setattr(pictures, "MAX_BYTES", len(data) - 1)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(InvalidRequest, match=f"at most {len(data) - 1} bytes"):
            read_picture(source)


def test_a_small_file_that_would_decode_to_gigabytes_is_refused() -> None:
    bomb = bytearray(file(Image.new("1", (64, 64))))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height of the header
    with pytest.raises(InvalidRequest):
        read_picture(bytes(bomb))


FILES = tuple(file(Image.fromarray(noise(24, 31, 3)), kind, exif=exif(6)) for kind in ("PNG", "JPEG", "WEBP"))


# Pillow tells of damaged EXIF data by a warning and reads on.
@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.sampled_from(FILES),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    kept=st.integers(0, 3000),
)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(
    data: bytes, edits: list[tuple[int, int]], kept: int
) -> None:
    damaged = bytearray(data)
    for at, value in edits:
        damaged[at % len(damaged)] = value
    try:
        assert read_picture(bytes(damaged[:kept])).ndim == 3
    except InvalidRequest as refused:
        assert refused.field == "init_image"
