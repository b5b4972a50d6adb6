"""What a worker needs of the outside, looked at before anything heavy is loaded: wrong settings answer at once."""

import logging
import time
from dataclasses import dataclass
from typing import Final

from kombu import Connection

from jobs import schema
from jobs.errors import StorageError, StorageRefused
from jobs.probe import probe
from jobs.redaction import hide, shown_url
from jobs.settings import Settings
from jobs.storage import Storage, open_storage
from jobs.store import Store
from worker.app import is_embedded
from worker.reasons import BrokerUnavailable

log = logging.getLogger(__name__)

PROBE_AGAIN_S: Final = 0.5


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
    """What a worker may not write shows now, not after the first rendered job. Raises StorageError."""
    try:
        with probe(storage):
            return
    except StorageRefused:
        raise
    except StorageError as error:
        # Workers that start all at once can be too much for a small server for a moment.
        log.warning("%s; trying once more in %.1f s", error, PROBE_AGAIN_S)
        time.sleep(PROBE_AGAIN_S)
    with probe(storage):
        pass


def check_broker(url: str) -> None:
    """Raises ``BrokerUnavailable`` in one sentence when nothing answers at ``url``."""
    if is_embedded(url):
        return
    try:
        with Connection(url, connect_timeout=5, transport_options={"socket_connect_timeout": 5}) as connection:
            connection.ensure_connection(max_retries=1, timeout=6)
    except Exception as error:  # kombu's own errors, redis', or the socket's; a KeyError for a bad ssl_cert_reqs
        raise BrokerUnavailable(
            f"the broker {shown_url(url)} does not answer: {hide(str(error)).rstrip('.')}; "
            "start it or set NIGHTSHIFT_BROKER_URL"
        ) from None
