"""What must never be seen in a log, an error or a row: passwords in URLs, and the secrets of the environment."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from functools import lru_cache
from types import TracebackType
from urllib.parse import parse_qsl, unquote, urlsplit

HIDDEN = "***"
#: A shorter value is no secret that anybody can keep, and hiding it would tear words apart.
SHORTEST = 4
#: Of the id of a key, which is no secret and may be a common word; AWS's own have 20 characters.
SHORTEST_ID = 16

_URLS = ("NIGHTSHIFT_DATABASE_URL", "NIGHTSHIFT_BROKER_URL", "NIGHTSHIFT_STORAGE_URL", "AWS_ENDPOINT_URL",
         "AWS_ENDPOINT_URL_S3", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")  # fmt: skip
_IDS = ("AWS_ACCESS_KEY_ID",)
_KEYS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD", "HF_TOKEN",
         "HUGGING_FACE_HUB_TOKEN")  # fmt: skip
_SECRET_NAME = r"(?:password|passwd|pwd|secret|token|credential|signature|sslkey|access_key)"
# Greedy up to the last @ of the word: a password may have an @, a / or a # that nobody escaped.
_USERINFO = re.compile(r"(?<=://)([^\s:@/?#'\"]*):[^\s'\"]*@")
_QUERY = re.compile(rf"([?&;][\w-]*{_SECRET_NAME}[\w-]*=)[^\s&;'\"]+", re.IGNORECASE)


def hide(text: str) -> str:
    """The text without passwords of URLs, and without any secret that this process got from its environment."""
    for secret in _secrets_of(tuple(os.environ.get(name, "") for name in (*_URLS, *_IDS, *_KEYS))):
        text = text.replace(secret, HIDDEN)
    return _QUERY.sub(rf"\1{HIDDEN}", _USERINFO.sub(rf"\1:{HIDDEN}@", text))


@lru_cache(maxsize=8)
def _secrets_of(values: tuple[str, ...]) -> tuple[str, ...]:
    """The longest first: one secret may be a part of another."""
    urls, rest = values[: len(_URLS)], values[len(_URLS) :]
    ids, keys = rest[: len(_IDS)], rest[len(_IDS) :]
    found = {
        *keys,
        *(id for id in ids if len(id) >= SHORTEST_ID),
        *(secret for url in urls for secret in secrets_in(url)),
    }
    return tuple(sorted((secret for secret in found if len(secret) >= SHORTEST), key=len, reverse=True))


def secrets_in(url: str) -> Iterator[str]:
    """The secrets of a URL, as they are written there and as they are meant."""
    userinfo = re.search(r"://[^:@/]*:(.*)@", url)
    query = url.rpartition("?")[2] if "?" in url else ""
    named = [value for name, value in parse_qsl(query) if re.search(_SECRET_NAME, name, re.IGNORECASE)]
    for secret in [*([userinfo[1]] if userinfo else []), *named]:
        yield secret
        yield unquote(secret)


def shown_url(url: str) -> str:
    """The URL as it may be shown: without password, and without what else in it is secret."""
    return hide(url)


def check_authority(url: str) -> None:
    """Raises ValueError, without quoting any of it, for a URL whose password would be taken for something else.

    An unescaped `/` or `@` in a password moves a part of it into the host or the port, and so into error messages.
    """
    try:
        parts = urlsplit(url)
        sound = parts.netloc.count("@") <= 1 and "@" not in parts.path + parts.query + parts.fragment
        _ = parts.port
    except ValueError:
        sound = False
    if not sound:
        raise ValueError(
            "cannot be read: host and port are not where they should be; in a name or password write %40 for @, "
            "%3A for :, %2F for /, %23 for #, %3F for ? and %25 for %"
        )


def with_checked_certificate(broker_url: str) -> str:
    """The URL, for `rediss://` with the demand that the server's certificate is checked, unless it says otherwise.

    kombu's default is to believe whoever answers, and to tell him the password.
    """
    return ";".join(map(_demanding, broker_url.split(";")))


def _demanding(url: str) -> str:
    if not url.startswith("rediss:") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"


def guard_tracebacks() -> None:
    """Let tracebacks that nobody caught be written without secrets too, in every thread of this process."""
    sys.excepthook = _write_traceback
    threading.excepthook = lambda args: _write_traceback(args.exc_type, args.exc_value, args.exc_traceback)


def _write_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, SystemExit):
        sys.stderr.write(hide("".join(traceback.format_exception(kind, error, trace))))
