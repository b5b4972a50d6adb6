"""What several tests of the engine share: one tiny model folder, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole diffusers folder; to be read, not changed."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
