"""What a worker needs of the outside, looked at before anything heavy is loaded: wrong settings answer at once."""

from dataclasses import dataclass
from urllib.parse import urlsplit
from uuid import uuid4

from kombu import Connection

from jobs import schema
from jobs.settings import Settings
from jobs.storage import Storage, open_storage
from jobs.store import Store
from worker.app import is_embedded
from worker.reasons import BrokerUnavailable


@dataclass(frozen=True, slots=True)
class Services:
    """The database and the storage, both answering."""

    store: Store
    storage: Storage


def open_services(settings: Settings) -> Services:
    """Open and ask each service once; a SQLite database is made and migrated when it needs it.

    Raises SettingsError, SchemaOutdated, DatabaseUnavailable, StorageError, BrokerUnavailable, each with its remedy.
    """
    settings.make_home()
    store = Store.open(settings.database_url)
    schema.ensure(store.engines)
    storage = open_storage(settings.storage_url)
    probe_storage(storage)
    check_broker(settings.broker_url)
    return Services(store, storage)


def probe_storage(storage: Storage) -> None:
    """Put a small object and remove it: what a worker may not write shows now, not after the first rendered job.

    Raises StorageError.
    """
    key = f"images/probe-{uuid4()}"
    storage.put(key, b"", "application/octet-stream")
    storage.delete(key)


def check_broker(url: str) -> None:
    """Raises ``BrokerUnavailable`` in one sentence when nothing answers at ``url``."""
    if is_embedded(url):
        return
    with Connection(url, connect_timeout=5, transport_options={"socket_connect_timeout": 5}) as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=6)
        except Exception as error:  # kombu's own errors, redis', or the socket's
            raise BrokerUnavailable(
                f"the broker {shown_broker(url)} does not answer: {str(error).rstrip('.')}; "
                "start it or set NIGHTSHIFT_BROKER_URL"
            ) from None


def shown_broker(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":***@", 1)
