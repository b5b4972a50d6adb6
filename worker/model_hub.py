"""A model hub, through huggingface_hub: what a repository has, and its files, resumed and checked against its sums.

The library downloads; where a download stopped is kept here, because the library forgets it when the process ends.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from worker.model_entry import reason
from worker.reasons import HubUnavailable

_TIMEOUT_S = 20.0
_AGAIN = "pull again, it goes on where it stopped"


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
class Listing:
    """A repository at a commit: its files by name."""

    repository: str
    commit: str
    files: Mapping[str, Remote]


@dataclass(frozen=True, slots=True)
class Hub:
    """The hub at an address (HF_ENDPOINT, or the public one). Its methods raise PullError and HubUnavailable."""

    endpoint: str = constants.ENDPOINT

    def listing(self, repository: str, revision: str | None = None) -> Listing:
        """Every file of a repository (`org/name`) at a branch, tag or commit; None: the newest."""
        with self._told(repository, revision):
            try:
                info = HfApi(self.endpoint).model_info(
                    repository, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
                )
                files = {sibling.rfilename: _remote(sibling) for sibling in info.siblings or []}
            except HfHubHTTPError:
                raise
            except HFValidationError as error:
                raise PullError(f"{repository!r} is no id of a model; it has the form org/name") from error
            except (ValueError, TypeError, KeyError) as error:  # another kind of server: its answer is no listing
                raise PullError(f"{self.endpoint} does not answer like a model hub; check HF_ENDPOINT") from error
        if not re.fullmatch(r"\w[\w.-]*", info.sha or ""):
            raise PullError(f"{self.endpoint} tells no commit of {repository}; check HF_ENDPOINT")
        return Listing(repository, str(info.sha), files)

    def fetch(self, listing: Listing, remote: Remote, target: Path) -> None:
        """One file, from where it stopped the last time; it gets its name when its sum is right."""
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _part(target)
        if arrived(target) > remote.size:
            part.unlink()
        with self._told(listing.repository), part.open("ab") as file:
            http_get(
                hf_hub_url(listing.repository, remote.name, revision=listing.commit, endpoint=self.endpoint),
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=remote.size,
                displayed_filename=remote.name,
            )
        if problem := _mismatch(part, remote):
            part.unlink()  # resuming it would only make it longer
            raise PullError(f"{remote.name} of {listing.repository} arrived damaged: {problem}; pull again")
        part.rename(target)

    @contextmanager
    def _told(self, repository: str, revision: str | None = None) -> Iterator[None]:
        """The library's errors, each as one sentence with its remedy."""
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise PullError("HF_HUB_OFFLINE is set, so no hub is asked for anything; unset it for this once") from error
        except GatedRepoError as error:
            raise PullError(
                f"{repository} is shown after a consent: give it at {self.endpoint}/{repository}, then `hf auth login`"
            ) from error
        except RepositoryNotFoundError as error:
            raise PullError(
                f"{self.endpoint} has no model {repository!r}, or does not show it; check the id, or `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise PullError(
                f"{repository} has no revision {revision!r}; choose a branch, tag or commit of it"
            ) from error
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status < 500 and status not in (408, 429):
                said = error.server_message or "no reason given"
                raise PullError(
                    f"{self.endpoint} refused {repository} ({status}: {said}); check the id, or `hf auth login`"
                ) from error
            raise HubUnavailable(f"{self.endpoint} answered {status} for {repository}; {_AGAIN}") from error
        except HTTPError as error:
            said = str(error).strip() or type(error).__name__
            raise HubUnavailable(f"{self.endpoint} cannot be reached ({said}); {_AGAIN}") from error
        except OSError as error:
            if error.errno is None:  # the library's own, for a file that ended early
                raise HubUnavailable(f"{self.endpoint} ended a file early; {_AGAIN}") from error
            raise PullError(f"{repository} cannot be stored: {reason(error)}") from error


def _remote(sibling: RepoSibling) -> Remote:
    size = sibling.lfs.size if sibling.lfs is not None else sibling.size
    return Remote(sibling.rfilename, size or 0, sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id)


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def arrived(target: Path) -> int:
    """Bytes of a file that are here already."""
    return next((path.stat().st_size for path in (target, _part(target)) if path.exists()), 0)


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
