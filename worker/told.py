"""How the worker's commands end: expected trouble is one sentence and an exit code. Imports nothing heavy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import click

from jobs.errors import DatabaseUnavailable, NightshiftError, StorageError
from jobs.redaction import hide
from worker.exit_codes import BROKEN, UNAVAILABLE, WRONG_SETTINGS
from worker.reasons import BrokerUnavailable, HubUnavailable

#: What the extra `worker` installs and the base does not.
_EXTRA = ("torch", "numpy", "safetensors", "tokenizers", "huggingface_hub")
_AWAY = (DatabaseUnavailable, StorageError, BrokerUnavailable, HubUnavailable)


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Expected trouble becomes one sentence and an exit code; a traceback would hide the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        click.echo(f"This command needs {error.name}: pip install 'nightshift[worker]'", err=True)
        raise SystemExit(WRONG_SETTINGS) from None
    except NightshiftError as error:
        click.echo(f"Error: {hide(str(error))}", err=True)
        raise SystemExit(UNAVAILABLE if isinstance(error, _AWAY) else WRONG_SETTINGS) from None
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception:
        logging.getLogger(__name__).critical("unexpected", exc_info=True)
        raise SystemExit(BROKEN) from None
