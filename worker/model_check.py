"""The torch half of the models command: what the engine says of a model. Its refusals become BadModel."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd_engine import WeightsError, load_model
from sd_engine.checkpoint import Choice
from sd_engine.convert import convert
from sd_engine.errors import InvalidArgument
from sd_engine.inspection import Inspection, inspect, verify
from worker.model_entry import Progress, ShelfError, Source, reason
from worker.model_files import BadModel
from worker.model_shelf import Shelf

_PADDING = 64  # trainers round an embedding's rows up, to a multiple of this at most


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (WeightsError, InvalidArgument) as error:
        raise BadModel(" ".join(str(error).split())) from error


def check(source: Source) -> None:
    """Load the model as a worker would, in the dtype that it is stored in, so that its numbers stay in the file.

    Raises BadModel, in the engine's words.
    """
    found = check_names(source)
    with _refusals():
        model = load_model(source.path, "cpu", stored_dtype(found), **source.options())
    tokens, rows = model.tokenizer.vocab_size, model.text_encoder.config.vocab_size
    if tokens <= rows - _PADDING:  # the engine refuses more; fewer are read without a word, and mean other words
        raise BadModel(
            f"the tokenizer has {tokens} tokens, the text encoder of {source.path} {rows}; give --tokenizer that of "
            "the model itself"
        )


def check_names(source: Source) -> Inspection:
    """Refuse what names and shapes show to be no model, before anything is copied; what is in it, if it is one.

    Raises BadModel, in the engine's words.
    """
    found = look(source)
    if found.problems:
        raise BadModel("; ".join(" ".join(problem.split()) for problem in found.problems))
    return found


def look(source: Source) -> Inspection:
    """What is in it, without reading a tensor; problems are told, not raised."""
    return inspect(source.path, _choice(source))


def sound(source: Source) -> list[str]:
    """The problems, each a sentence, that reading every number of a model shows."""
    return verify(source.path, _choice(source))


def sound_on_shelf(shelf: Shelf, name: str, progress: Progress) -> list[str]:
    """The problems, each a sentence, that reading all of a model on the shelf shows, and loading it."""
    try:
        entry = shelf.entry(name)
        if problems := entry.damages(progress):
            return problems
        try:
            check(entry.source)  # its tokenizer and embeddings too
        except BadModel as error:
            return sound(entry.source) or [str(error)]  # all that is wrong with the numbers, not the first
    except ShelfError as error:
        return [str(error)]
    except OSError as error:
        return [f"it cannot be read: {reason(error)}"]
    return []


def stored_dtype(found: Inspection) -> str:
    """The dtype of the U-Net's tensors; fp32 for what no model can be computed in."""
    unet = next((part.dtypes for part in found.parts if part.component == "unet"), {})
    most = max(unet, key=lambda name: unet[name], default="fp32")
    return most if most in ("fp16", "bf16") else "fp32"


def convert_to(source: Source, target: Path, dtype: str | None, *, force: bool) -> None:
    """Write a model as a diffusers folder. `force`: in the place of a model that is there, once the new one is whole.

    Raises BadModel.
    """
    _check_target(target, force)
    target = target.absolute()
    options = {name: value for name, value in source.options().items() if name != "embeddings"}
    written = target.with_name(f".{target.name}.new") if target.exists() else target
    with _refusals():
        shutil.rmtree(written, ignore_errors=True)
        convert(source.path, written, dtype, **options)
    if written != target:
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # what a killed process left beside its new one
        target.rename(old)
        written.rename(target)
        shutil.rmtree(old)


def _check_target(target: Path, force: bool) -> None:
    """Raises BadModel for what is there already; nothing but a diffusers folder is ever replaced."""
    if target.absolute() == Path.cwd():
        raise BadModel("OUT is the folder that you are in, and would be another one; name one that is made")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "unet" / "config.json").is_file():
        raise BadModel(f"{target} is there already and no diffusers folder, so it stays; choose another place")
    if not force:
        raise BadModel(f"{target} is there already; choose another place, or replace it with --force")


def _choice(source: Source) -> Choice:
    return Choice(
        variant=source.variant,
        ema=source.ema,
        vae=source.vae,
        prediction=source.prediction,
        zero_snr=source.zero_snr,
    )
