"""A spec to what the engine accepts."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs import inputs
from jobs.inputs import Inputs
from jobs.spec import JobSpec
from jobs.storage import DirStorage, Storage
from sd_engine import pictures
from tests.jobs.specs import specs
from worker.reasons import Unusable
from worker.translate import to_requests


def png(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def key_of(data: bytes) -> str:
    return f"inputs/{hashlib.sha256(data).hexdigest()}.png"


RNG = np.random.default_rng(0)
#: As it lies in the file; its EXIF orientation says that it stands: 64 wide and 96 high.
LYING = RNG.integers(0, 256, (64, 96, 4), dtype=np.uint8)
EXIF = Image.Exif()
EXIF[0x0112] = 6
PICTURE = png(LYING, exif=EXIF)
MASK = png(RNG.integers(0, 256, (96, 64), dtype=np.uint8))
SPECS = specs() | specs(init_image=key_of(PICTURE)) | specs(init_image=key_of(PICTURE), mask=key_of(MASK))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """With PICTURE and MASK in it, as submit stores them."""
    storage = DirStorage(tmp_path_factory.mktemp("storage"))
    Inputs(lambda: storage).stored(JobSpec(prompt="x", init_image=PICTURE, mask=MASK))
    yield storage


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(SPECS, st.integers(0, 9))
def test_every_valid_spec_with_good_pictures_is_something_that_the_engine_accepts(
    storage: Storage, spec: JobSpec, seed: int
) -> None:
    stored = Inputs(lambda: storage).stored(spec.model_copy(update={"seed": seed}))
    requests = to_requests(stored, storage)
    assert [request.seed for request in requests] == list(range(seed, seed + spec.images))
    for request in requests:
        told = {name: getattr(request, name) for name in JobSpec.model_fields if name in request.__slots__}
        pictures = {name: told.pop(name) is not None for name in ("init_image", "mask")}
        assert pictures == {name: getattr(spec, name) is not None for name in pictures}
        del told["seed"]
        assert told == {name: getattr(spec, name) for name in told}
        if request.upscale is not None:
            request.larger(*request.size(64, 64))


def test_a_picture_arrives_upright_and_keeps_its_transparency(storage: Storage) -> None:
    (request,) = to_requests(JobSpec(prompt="x", seed=1, init_image=key_of(PICTURE)), storage)
    assert request.init_image is not None
    np.testing.assert_array_equal(request.init_image, np.rot90(LYING, -1))


def test_a_mask_arrives_as_its_brightness(storage: Storage) -> None:
    (request,) = to_requests(JobSpec(prompt="x", seed=1, init_image=key_of(PICTURE), mask=key_of(MASK)), storage)
    assert request.mask is not None
    np.testing.assert_array_equal(request.mask, np.asarray(Image.open(io.BytesIO(MASK))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_what_submit_takes_for_a_mask_the_worker_can_use(tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (64, 96)).save(buffer, "PNG")
    storage = DirStorage(tmp_path)
    spec = Inputs(lambda: storage).stored(JobSpec(prompt="x", seed=1, init_image=PICTURE, mask=buffer.getvalue()))
    (request,) = to_requests(spec, storage)
    assert request.mask is not None and request.mask.shape == (96, 64) and not request.mask.any()


def test_no_picture_is_too_large_for_the_worker_that_submit_takes() -> None:
    assert inputs.MAX_BYTES <= pictures.MAX_BYTES and inputs.MAX_PIXELS <= pictures.MAX_PIXELS


def test_the_picture_of_a_phone_that_has_a_second_one_inside_arrives(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64), "red").save(
        buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32), "blue")]
    )
    storage = DirStorage(tmp_path)
    (request,) = to_requests(
        Inputs(lambda: storage).stored(JobSpec(prompt="x", seed=1, init_image=buffer.getvalue())), storage
    )
    assert request.init_image is not None and request.init_image.shape == (64, 96, 3)
    assert tuple(request.init_image.mean((0, 1)).round(-1)) == (250, 0, 0)


def test_a_picture_and_a_mask_that_do_not_fit_are_told_in_a_sentence(storage: Storage) -> None:
    spec = JobSpec(prompt="x", seed=1, init_image=key_of(MASK), mask=key_of(MASK)[:-5] + "0.png")
    with pytest.raises(Unusable, match=r"^mask: inputs/.* is not in the storage"):
        to_requests(spec, storage)
    small = png(np.zeros((64, 64), np.uint8))
    storage.put(key_of(small), small, "image/png")
    with pytest.raises(Unusable, match=r"mask\.size"):
        to_requests(JobSpec(prompt="x", seed=1, init_image=key_of(PICTURE), mask=key_of(small)), storage)
