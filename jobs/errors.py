"""Everything that `jobs` raises on purpose.

NightshiftError
├── InvalidSpec         the job asked for cannot be; lists every bad field      (also a ValueError)
├── BadFile             a bulk file that cannot be read as a whole              (also a ValueError)
├── SettingsError       a setting is unusable: bad URL, unknown scheme, missing extra
├── DatabaseUnavailable the database does not answer
├── SchemaOutdated      the database's tables are not those of this version
├── JobNotFound         no such job, batch or image                             (also a LookupError)
├── JobConflict         the job's state does not allow what was asked
├── WaitTimeout         the jobs did not end in the time given                  (also a TimeoutError)
└── StorageError        the storage refused or could not be reached
    ├── StorageRefused  credentials or permissions: a person must help, waiting does not
    ├── InvalidKey      a key that storage never takes                          (also a ValueError)
    └── KeyNotFound     no object of that key                                   (also a LookupError)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class NightshiftError(Exception):
    """The root: every error that a caller may want to catch and show."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One reason why a spec was refused; `message` names the value and what is allowed."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidSpec(NightshiftError, ValueError):
    """The job asked for cannot be rendered; `errors` has one entry per bad field."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = errors


class BadFile(NightshiftError, ValueError):
    """A bulk file as a whole cannot be read; says why and what to do."""


class SettingsError(NightshiftError):
    """A setting is unusable; the sentence names the variable and the remedy, never a password."""


class DatabaseUnavailable(NightshiftError):
    """The database does not answer."""


class SchemaOutdated(NightshiftError):
    """The tables are older or newer than this version of the code."""


class JobNotFound(NightshiftError, LookupError):
    """No such job, batch or image."""


class JobConflict(NightshiftError):
    """The state of the job does not allow what was asked."""


class WaitTimeout(NightshiftError, TimeoutError):
    """Not all jobs ended in the time given."""


class StorageError(NightshiftError):
    """The storage refused, or could not be reached."""


class StorageRefused(StorageError):
    """The storage answers, but not to us: expired or missing credentials, no permission, a clock that is far off.

    Not the job's fault, and asking again at once is of no use: somebody must let us in first.
    """


class InvalidKey(StorageError, ValueError):
    """A key that no storage takes: it would not stay inside the storage's root."""


class KeyNotFound(StorageError, LookupError):
    """There is no object of that key."""


def shown(value: object) -> str:
    """A value as errors quote it: whole when it is short, so that a megabyte is not repeated."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
