"""What the tests of the models command share: how it is called, how a model is spoiled, how one is drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from sd_engine import Engine, Request
from worker.model_shelf import Shelf
from worker.models_cli import models
from worker.workshop import TorchOptions, open_workshop


def run(*words: object) -> Result:
    return CliRunner().invoke(models, [str(word) for word in words])


def ran(*words: object) -> str:
    """The output of a command that must succeed."""
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> str:
    """What a command that is refused says: one line."""
    result = run(*words)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    return result.stderr


def on_disk(shelf: Shelf) -> list[str]:
    """Everything in the shelf's folder, hidden or not."""
    return sorted(path.name for path in shelf.folder.iterdir()) if shelf.folder.exists() else []


def draw(models: dict[str, Path | str], name: str) -> Any:
    """A picture by a worker's own engine."""
    workshop = open_workshop(models, TorchOptions("cpu"))
    assert not workshop.broken
    engine = workshop.make_engine()
    assert isinstance(engine, Engine)
    (picture,) = engine.render([Request("a red cat", model=name, steps=2, height=64, width=64, seed=7)])
    return picture


def torn(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
