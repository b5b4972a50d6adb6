"""Models from a hub, through huggingface_hub: what is needed and no more, resumed, and checked against the hub's sums.

The library downloads; where a download stopped is kept here, because the library forgets it when the process ends.
Nothing but `nightshift models pull` and `add` comes here: a worker never asks a hub.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # not exported, but the one name for it that stays when the library below changes
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from jobs.errors import NightshiftError
from worker.model_entry import Source
from worker.model_files import BadModel, checkpoint_file, folder_files, is_folder_model, names_in, tokenizer_files
from worker.model_shelf import PULLING, Shelf
from worker.reasons import HubUnavailable

_TIMEOUT_S = 20.0
_AGAIN = "pull again, it goes on where it stopped"
_SPARE = 64 << 20  # bytes that stay free on the disk


class PullError(NightshiftError):
    """The hub has no such thing, does not show it, or sent something else; says what to do."""


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on the hub: size in bytes, and its sha256 (large files) or the SHA-1 that git gives it (small ones)."""

    name: str
    size: int
    sha256: str | None
    blob: str | None


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was fetched: a folder with the hub's names, the commit that they are of."""

    folder: Path
    commit: str


@contextmanager
def pulled(
    shelf: Shelf, repository: str, choose: Callable[[Collection[str]], Iterable[str]], revision: str | None = None
) -> Iterator[Pulled]:
    """Fetch the chosen files of a repository (`org/name`); they are removed at the end, and kept after an error.

    So the next attempt goes on where this one stopped. Raises PullError, HubUnavailable (trying again can help),
    ShelfError when another process pulls the same, and whatever `choose` raises.
    """
    with _told(repository, revision):
        commit, there = _listing(repository, revision)
    wanted = [there[name] for name in choose(there)]
    with shelf.workplace(f"{PULLING}{repository.replace('/', '--')}@{commit[:12]}", keep=True) as folder:
        with _told(repository, revision):
            _check_space(folder, wanted)
            for remote in sorted(wanted, key=lambda remote: remote.size):  # what is small and wrong shows early
                _fetch(repository, commit, remote, folder / remote.name)
        yield Pulled(folder, commit)


@contextmanager
def pulled_model(
    shelf: Shelf, repository: str, revision: str | None, *, variant: str | None, file: str | None, tokenizer: bool
) -> Iterator[tuple[Source, str]]:
    """A model and, unless it comes from elsewhere, its `tokenizer`; with the commit that they are of. See `pulled`."""
    choose = partial(model_files, variant=variant, file=file, tokenizer=tokenizer)
    with pulled(shelf, repository, choose, revision) as fetched:
        folder, names = fetched.folder, names_in(fetched.folder)
        if file is None and is_folder_model(names):
            yield Source(folder, variant=variant), fetched.commit
        else:
            words = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
            yield Source(folder / (file or checkpoint_file(names)), words if tokenizer else None), fetched.commit


def model_files(names: Collection[str], *, variant: str | None, file: str | None, tokenizer: bool) -> list[str]:
    """What a model needs of a repository: a diffusers folder if it is one and no `file` is named, else a checkpoint.

    tokenizer: whether it must come from there too. Raises BadModel.
    """
    if file is None and is_folder_model(names):
        return list(folder_files(names, variant=variant, tokenizer=tokenizer))
    checkpoint = checkpoint_file(names, file)
    return [checkpoint, *(tokenizer_of(names) if tokenizer else [])]


def tokenizer_of(names: Collection[str]) -> list[str]:
    """The tokenizer's files of a repository: in `tokenizer/`, or of a repository that is one. Raises BadModel."""
    try:
        return tokenizer_files(names, "tokenizer/")
    except BadModel:
        return tokenizer_files(names)


def _listing(repository: str, revision: str | None) -> tuple[str, Mapping[str, Remote]]:
    """The commit and every file of it."""
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        files = {sibling.rfilename: _remote(sibling) for sibling in info.siblings or []}
    except HFValidationError as error:
        raise PullError(f"{repository!r} is no id of a model; it has the form org/name") from error
    except (ValueError, TypeError, KeyError) as error:  # another kind of server: its answer is no listing
        raise PullError(f"{constants.ENDPOINT} does not answer like a model hub; check HF_ENDPOINT") from error
    if not info.sha:
        raise PullError(f"{constants.ENDPOINT} does not tell a commit of {repository}; check HF_ENDPOINT")
    return info.sha, files


def _remote(sibling: RepoSibling) -> Remote:
    size = sibling.lfs.size if sibling.lfs is not None else sibling.size
    return Remote(sibling.rfilename, size or 0, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)


def _check_space(folder: Path, wanted: Iterable[Remote]) -> None:
    rest = sum(remote.size - _arrived(folder / remote.name) for remote in wanted)
    free = shutil.disk_usage(folder).free
    if rest + _SPARE > free:
        raise PullError(f"{rest} bytes are still to come and the disk of {folder.parent} has {free} free; make room")


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _arrived(target: Path) -> int:
    return next((path.stat().st_size for path in (target, _part(target)) if path.exists()), 0)


def _fetch(repository: str, commit: str, remote: Remote, target: Path) -> None:
    """One file, from where it stopped; it gets its name when its sum is right."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part(target)
    if _arrived(target) > remote.size:
        part.unlink()
    with part.open("ab") as file:
        http_get(
            hf_hub_url(repository, remote.name, revision=commit),
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=remote.size,
            displayed_filename=remote.name,
        )
    if problem := _mismatch(part, remote):
        part.unlink()  # resuming it would only make it longer
        raise PullError(f"{remote.name} of {repository} arrived damaged: {problem}; pull again")
    part.rename(target)


def _mismatch(path: Path, remote: Remote) -> str:
    """How the file differs from what the hub says of it; empty if it does not."""
    size = path.stat().st_size
    if size != remote.size:
        return f"{size} bytes instead of {remote.size}"
    if remote.sha256 is not None:
        kind, wanted, found = "sha256", remote.sha256, _digest(path, hashlib.sha256())
    else:  # https://git-scm.com/book/en/v2/Git-Internals-Git-Objects: a header of kind and size, then the content
        kind, wanted, found = "git SHA-1", remote.blob or "none", _digest(path, hashlib.sha1(b"blob %d\0" % size))
    return "" if found == wanted else f"its {kind} is {found} instead of {wanted}"


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _told(repository: str, revision: str | None) -> Iterator[None]:
    """The library's errors, each as one sentence with its remedy."""
    hub = constants.ENDPOINT
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubUnavailable(
            "HF_HUB_OFFLINE is set, so no hub is asked for anything; unset it for this once"
        ) from error
    except GatedRepoError as error:
        raise PullError(
            f"{repository} is shown after a consent: give it at {hub}/{repository}, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise PullError(
            f"{hub} has no model {repository!r}, or does not show it to you; check the id, or `hf auth login` first"
        ) from error
    except RevisionNotFoundError as error:
        raise PullError(f"{repository} has no revision {revision!r}; choose a branch, tag or commit of it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status not in (408, 429):
            said = error.server_message or "no reason given"
            raise PullError(
                f"{hub} refused {repository} ({status}: {said}); check the id, or `hf auth login`"
            ) from error
        raise HubUnavailable(f"{hub} answered {status} for {repository}; {_AGAIN}") from error
    except HTTPError as error:
        reason = str(error).strip() or type(error).__name__
        raise HubUnavailable(f"{hub} cannot be reached ({reason}); {_AGAIN}") from error
    except OSError as error:
        if error.errno is None:  # the library's own, for a file that ended early
            raise HubUnavailable(f"{hub} ended a file early; {_AGAIN}") from error
        raise PullError(f"{repository} cannot be stored: {error.strerror} ({error.filename})") from error
