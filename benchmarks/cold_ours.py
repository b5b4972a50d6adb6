"""A process of `benchmarks.cold` that is ours."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from benchmarks.cold_process import answer
from sd_engine import Engine, Model, Request, load_model


def load(path: str, dtype: str, tokenizer: str) -> tuple[Model, Iterable[Tensor]]:
    """Any layout; a single file has no tokenizer of its own."""
    model = load_model(Path(path), "cpu", dtype, tokenizer=Path(tokenizer))
    return model, (tensor for module in model.modules.values() for tensor in module.state_dict().values())


def draw(model: Model, side: int | None) -> None:
    """One picture: guided, 20 steps."""
    Engine(model).render([Request("a red star", seed=1, steps=20, guidance=5.0, width=side, height=side)])


if __name__ == "__main__":
    answer(load, draw)
