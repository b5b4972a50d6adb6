"""The producer's half of Nightshift: describe, submit and follow render jobs. No torch.

from jobs import Client

with Client() as client:
    job = client.wait(client.submit("a small red star on a blue background"))
    png = client.image_bytes(job.id)
"""

from jobs.client import Batch, Client
from jobs.errors import (
    DatabaseUnavailable,
    FieldError,
    InvalidKey,
    InvalidSpec,
    JobConflict,
    JobNotFound,
    KeyNotFound,
    NightshiftError,
    SchemaOutdated,
    SettingsError,
    StorageError,
    WaitTimeout,
)
from jobs.samplers import SAMPLERS
from jobs.settings import Settings
from jobs.spec import JobSpec
from jobs.states import State
from jobs.views import JobView, Output

__all__ = [
    "SAMPLERS",
    "Batch",
    "Client",
    "DatabaseUnavailable",
    "FieldError",
    "InvalidKey",
    "InvalidSpec",
    "JobConflict",
    "JobNotFound",
    "JobSpec",
    "JobView",
    "KeyNotFound",
    "NightshiftError",
    "Output",
    "SchemaOutdated",
    "Settings",
    "SettingsError",
    "State",
    "StorageError",
    "WaitTimeout",
]
