"""What several tests of the worker share: a tiny model, as a folder and as an original single file."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import save_file

from jobs import Settings
from sd_engine import families
from sd_engine.weights import load_model
from tests.engine.models import configs_of, original_tensors
from tests.tiny_model import make_tiny_model
from worker.model_shelf import Shelf


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers folder; to be read, not changed."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model as an original single file without a tokenizer; its family is known to the engine meanwhile."""
    model = load_model(tiny_folder)
    known = cast(MutableMapping[int, Any], families.FAMILIES)
    monkeypatch.setitem(known, model.text_encoder.config.width, ("tiny", configs_of(model)))
    (tmp_path / "files").mkdir()
    path = tmp_path / "files" / "tiny.safetensors"
    save_file(original_tensors(tiny_folder), path)
    return path


@pytest.fixture
def shelf() -> Shelf:
    """That of the test's own data directory."""
    return Shelf(Settings().home)
