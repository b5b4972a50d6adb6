"""Words that users taught: the files of textual inversion, in both of their forms.

A1111's WebUI names the word by the file (`cat-toy.pt`); the reference library writes the word into the file
(`{"<cat-toy>": ...}`). Source: Gal et al. 2022, "An Image is Worth One Word" (arXiv 2208.01618).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from sd_engine.errors import WeightsError
from sd_engine.layouts import opened
from sd_engine.picklefile import is_plain, unpickled

_PICKLES: Final = (".pt", ".bin")
_SAFETENSORS: Final = ".safetensors"
_BY_FILE: Final = "emb_params"  # the one key of a safetensors file whose word is the file's name


def load_embeddings(folder: Path, width: int) -> dict[str, Tensor]:
    """Read every embedding of a folder and those below it: the word in the prompt -> its vectors [n, width], float32.

    Other files than `.pt`, `.bin` and `.safetensors` are left alone. Pickles may hold tensors and nothing else.
    Raises WeightsError, naming the file, for one that cannot be read, holds no embedding or one for another text
    encoder, and for two files with the same word.
    """
    if not folder.is_dir():
        raise WeightsError(f"there is no folder {folder} with embeddings; make it, or leave the setting out")
    embeddings: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        for word, vectors in _read(path):
            if word.lower() in files:
                raise WeightsError(f"{path} and {files[word.lower()]} both teach the word {word!r}; keep one of them")
            files[word.lower()] = path
            embeddings[word] = _checked(path, vectors, width)
    return embeddings


def _read(path: Path) -> Iterator[tuple[str, object]]:
    """The word of a file and its vectors; none for a file of another kind."""
    if path.suffix.lower() == _SAFETENSORS:
        with opened(path) as file:
            yield _word(path, {key: file.tensor(key) for key in file.keys})
    elif path.suffix.lower() in _PICKLES:
        # The first trainers wrote the module that held the vectors; reading one back runs no code of the file.
        yield _word(path, unpickled(path, nn.ParameterDict))


def _word(path: Path, content: object) -> tuple[str, object]:
    entries = _entries(content)
    # The WebUI's pickles have further entries, about the training, beside a map of one.
    by_file = _entries(entries["string_to_param"]) if "string_to_param" in entries else None
    if by_file is not None:
        entries = by_file
    if len(entries) != 1:
        held = f"{len(entries)} entries ({', '.join(map(str, entries))[:80]})" if entries else type(content).__name__
        raise WeightsError(f"{path} holds no embedding of Stable Diffusion 1.x or 2.x but {held}; move it elsewhere")
    ((key, vectors),) = entries.items()
    word = path.stem if by_file is not None or key == _BY_FILE else str(key).strip()
    if not word:
        raise WeightsError(f"{path} teaches a word without letters; give it one, by a file name or a token")
    return word, vectors


def _entries(content: object) -> dict[object, object]:
    if isinstance(content, nn.ParameterDict):
        content = content._parameters  # what its methods need was not yet written by PyTorch 1.11
    return dict(content) if isinstance(content, Mapping) else {}


def _checked(path: Path, vectors: object, width: int) -> Tensor:
    """float32 [n, width], whether one vector was written with or without n."""
    plain = isinstance(vectors, Tensor) and is_plain(vectors) and vectors.is_floating_point()
    if not isinstance(vectors, Tensor) or not plain or vectors.ndim not in (1, 2):
        raise WeightsError(f"{path} holds no vectors of numbers; download the embedding again")
    found = vectors.shape[-1]
    if found != width or not vectors.numel():
        raise WeightsError(
            f"{path} has vectors of width {found}, the model's text encoder takes {width} (768 are for Stable "
            "Diffusion 1.x, 1024 for 2.x); move the embedding to a folder for its own models"
        )
    if not bool(vectors.isfinite().all()):
        raise WeightsError(f"{path} holds numbers that are not finite; download the embedding again")
    return vectors.detach().float().reshape(-1, width).clone()
