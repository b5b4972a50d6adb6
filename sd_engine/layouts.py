"""Where the weights are: what a file is by its content, and which file of a folder holds a component."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from sd_engine import picklefile
from sd_engine.errors import WeightsError
from sd_engine.offload import Component
from sd_engine.tensorfile import TensorFile, joined, opened_safetensors

SUFFIXES: Final = (".safetensors", *picklefile.SUFFIXES)
_INDEX: Final = ".index"
# Of one component, without variant and suffix; transformers has another word for its pickles.
_STEMS: Final[Mapping[Component, tuple[str, str]]] = {
    "text_encoder": ("model", "pytorch_model"),
    "unet": ("diffusion_pytorch_model",) * 2,
    "vae": ("diffusion_pytorch_model",) * 2,
    "tiny_decoder": ("diffusion_pytorch_model",) * 2,
}
_VARIANTS: Final = (None, "fp16", "bf16", "fp32")  # taken in this order when none is asked for


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    """Open a file of tensors, or the index of a sharded one.

    Raises WeightsError for a file that is torn, unsafe, or not what its name says.
    """
    with _opener(path) as file:
        yield file


def _opener(path: Path) -> AbstractContextManager[TensorFile]:
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _opened_index(path)
    if suffix not in SUFFIXES:
        raise WeightsError(f"{path} has none of the suffixes of a model ({', '.join(SUFFIXES)})")
    _check_content(path)
    return opened_safetensors(path) if suffix == ".safetensors" else picklefile.opened_pickle(path)


def _check_content(path: Path) -> None:
    """Raises WeightsError for a file whose first bytes show that it is something other than its name says."""
    with path.open("rb") as file:
        start = file.read(64)
    wanted = "safetensors" if path.suffix.lower() == ".safetensors" else "pickle"
    found = _content(start)
    if found in ("safetensors", "pickle") and found != wanted:
        suffix = ".safetensors" if found == "safetensors" else ".ckpt"
        raise WeightsError(f"{path} is a {found} file under another name; rename it to {path.stem}{suffix}")
    if found == "page":
        raise WeightsError(f"{path} is a page of text, not weights: a download gave an answer instead of the file; "
                           "download it again, signed in where its source asks for that")  # fmt: skip
    if found == "pointer":
        raise WeightsError(f"{path} is a pointer of Git LFS, not the weights themselves; run `git lfs pull` there")
    if found == "nothing":
        raise WeightsError(f"{path} is empty; download it again")


def _content(start: bytes) -> str:
    if not start:
        return "nothing"
    if start.startswith(b"version https://git-lfs"):
        return "pointer"
    if start.lstrip().startswith((b"<", b'{"')):
        return "page"
    if start[8:9] == b"{":
        return "safetensors"
    return "pickle" if start.startswith((b"PK\x03\x04", b"\x80")) else "unknown"


@contextmanager
def _opened_index(path: Path) -> Iterator[TensorFile]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path} has no weight_map; download it again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise WeightsError(f"{path} names {outside[0]!r}; an index may only name files beside it")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise WeightsError(f"{path} names {', '.join(missing)}, which is not there; download the folder again")
    with ExitStack() as stack:
        shards = {name: stack.enter_context(opened(path.parent / name)) for name in names}
        yield joined(path, weight_map, shards)


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object. Raises WeightsError for a file that is missing or holds something else."""
    try:
        settings = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; a diffusers folder has one: copy it from the model's source") from None
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} does not hold a JSON object; download it again")
    return settings


def component_file(folder: Path, component: Component, variant: str | None = None) -> Path:
    """The weights of a component's folder: safetensors before pickles, whole before sharded, plain before variants.

    variant: only the files of this one. Raises WeightsError for a folder that has none.
    """
    variants = _VARIANTS if variant is None else (variant,)
    candidates = [name for each in variants for name in _file_names(component, each)]
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    asked = "" if variant is None else f" of the variant {variant!r}"
    raise WeightsError(
        f"{folder} has no weights{asked}: neither {candidates[0]} nor one of the other names "
        f"({', '.join(candidates[1:4])}); copy them from the model's source"
    )


def _file_names(component: Component, variant: str | None) -> Iterator[str]:
    stems = _STEMS[component]
    middle = "" if variant is None else f".{variant}"
    for stem, suffix in zip(stems, (".safetensors", ".bin"), strict=True):
        yield f"{stem}{middle}{suffix}"
        # Both orders are in use: the libraries write the first, some folders have the second.
        yield f"{stem}{suffix}{_INDEX}{middle}.json"
        if variant is not None:
            yield f"{stem}{middle}{suffix}{_INDEX}.json"


def bare_file(folder: Path, component: Component) -> Path | None:
    """The file of a component in a folder of bare component files, by its name alone: `unet.safetensors`."""
    names = (folder / f"{component}{suffix}" for suffix in SUFFIXES)
    return next((path for path in names if path.is_file()), None)
