"""Passwords and keys are in the environment and nowhere else; prompts are in the database and the pictures alone."""

from __future__ import annotations

import datetime
import io
import ipaddress
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from PIL import Image

from jobs import Client, Settings, SettingsError, State
from jobs.bell import Bell
from jobs.db import open_engines
from jobs.redaction import hide, shown_url
from jobs.store import Store
from jobs.views import Due
from tests.integration.processes import PATIENCE_S, fake_worker, stop, tail
from worker.logs import JsonFormatter, TextFormatter
from worker.preflight import check_broker
from worker.reasons import BrokerUnavailable

#: No part of it is a word that anybody would write by chance.
SECRET = "zQ7xK9vTw3"
ESCAPED = "zQ7xK%2FvT%40w3"
AWS = {
    "AWS_ACCESS_KEY_ID": "AKIAZQ7XK9VTW3EXAMPL",
    "AWS_SECRET_ACCESS_KEY": "zQ7xK9vTw3/aws+secret",
    "AWS_SESSION_TOKEN": "zQ7xK9vTw3aws=session",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",
    "HF_TOKEN": "hf_zQ7xK9vTw3",
}
#: Every piece that would be told if any of them were.
PIECES = ("zQ7xK", "vTw3", "vT@w3", "vT%40w3", "AKIAZQ7", "K9VTW3")
CLOSED = "127.0.0.1:1"

URLS: Mapping[str, tuple[str, ...]] = {
    "NIGHTSHIFT_BROKER_URL": (
        f"redis://:{SECRET}@{CLOSED}/0",
        f"redis://name:{ESCAPED}@{CLOSED}/0",
        f"rediss://:{SECRET}@{CLOSED}/0",
        f"rediss://:{SECRET}@{CLOSED}/0?ssl_cert_reqs=nonsense",
        f"redis://:{SECRET}@{CLOSED}/no-number",
        f"redis://:{SECRET}@127.0.0.1:99999/0",
        f"redis://:{SECRET}@[::1/0",
        "redis://:zQ7xK/vTw3@127.0.0.1:1/0",
        "redis://:zQ7xK#vTw3@127.0.0.1:1/0",
        "redis://:zQ7xK?vTw3@127.0.0.1:1/0",
        "redis://:zQ7xK@vTw3@127.0.0.1:1/0",
        f"redis://{CLOSED}/0?password={SECRET}",
        f"redis://:{SECRET}@{CLOSED}/0;redis://:{SECRET}@{CLOSED}/1",
        f"amqp://guest:{SECRET}@{CLOSED}//",
    ),
    "NIGHTSHIFT_DATABASE_URL": (
        f"postgresql://name:{SECRET}@{CLOSED}/db",
        f"postgresql://name:{ESCAPED}@{CLOSED}/db",
        f"postgresql://name@{CLOSED}/db?password={SECRET}",
        f"postgresql://name:{SECRET}@127.0.0.1:port/db",
        f"postgresql://name:{SECRET}@[::1/db",
        "postgresql://name:zQ7xK/vTw3@127.0.0.1:1/db",
        "postgresql://name:zQ7xK@vTw3@127.0.0.1:1/db",
        f"postgresql://name:{SECRET}@{CLOSED}/db?no_such_option=1",
        f"mysql://name:{SECRET}@{CLOSED}/db",
        f"postgresql:/name:{SECRET}@{CLOSED}/db",
    ),
    "NIGHTSHIFT_STORAGE_URL": (
        f"s3://key:{SECRET}@bucket/x",
        f"s3://bucket/x?secret={SECRET}",
        f"ftp://name:{SECRET}@host/x",
    ),
}
EACH = [(name, url) for name, urls in URLS.items() for url in urls]


def told(text: str) -> list[str]:
    """The pieces of a secret that stand in the text."""
    return [piece for piece in PIECES if piece in text]


def run(*command: str, **variables: str) -> str:
    """All that a command of ours says, of whatever kind."""
    result = subprocess.run(
        [sys.executable, "-m", *command],
        env=dict(os.environ) | AWS | variables,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"


@pytest.fixture
def secrets_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(("name", "url"), EACH)
def test_no_error_tells_a_secret_of_a_url(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an application sees it that uses the client in its own process, and logs what is raised."""
    monkeypatch.setenv(name, url)
    said: list[str] = []
    for ask in (
        lambda: Client().submit("x"),
        lambda: check_broker(Settings().broker_url),
        lambda: open_engines(Settings().database_url),
    ):
        try:
            said.append(repr(ask()))
        except Exception as error:
            said += [str(error), repr(error), repr(error.__cause__)]
    assert told("\n".join(said)) == []


SAMPLE = [
    URLS["NIGHTSHIFT_BROKER_URL"][1],
    URLS["NIGHTSHIFT_BROKER_URL"][7],
    URLS["NIGHTSHIFT_DATABASE_URL"][1],
]


@pytest.mark.parametrize(("name", "url"), [(name, url) for name, url in EACH if url in SAMPLE])
@pytest.mark.parametrize("command", [("worker", "--json", "--device", "cpu"), ("jobs.cli", "status", "--json")])
def test_no_process_tells_a_secret_whatever_is_wrong_or_away(name: str, url: str, command: tuple[str, ...]) -> None:
    if name == "NIGHTSHIFT_BROKER_URL" and command[0] == "jobs.cli":
        command = ("jobs.cli", "submit", "x", "--json")
    said = run(*command, **{name: url, "NIGHTSHIFT_MODELS": "torn=/nowhere"})
    assert told(said) == [], said
    assert "Traceback" not in said, said


def test_a_bucket_that_refuses_tells_no_key() -> None:
    """Keys of AWS are in signatures and in the answers of some servers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = (
            b"<Error><Code>InvalidAccessKeyId</Code><Message>"
            + AWS["AWS_ACCESS_KEY_ID"].encode()
            + b"</Message></Error>"
        )
        thread = threading.Thread(target=_refuse_all, args=(server, answer), daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        variables = {"NIGHTSHIFT_STORAGE_URL": "s3://bucket/x", "AWS_ENDPOINT_URL": endpoint}
        said = run("worker", "--verbose", "--device", "cpu", **variables)
    assert "bucket" in said and told(said) == [], said


def _refuse_all(server: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            connection.recv(65536)
            head = f"HTTP/1.1 403 Forbidden\r\nContent-Length: {len(answer)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + answer)


@pytest.mark.parametrize("formatter", [TextFormatter("%(message)s"), JsonFormatter()])
@pytest.mark.usefixtures("secrets_around")
def test_no_line_of_a_log_tells_a_secret_not_even_of_a_library(
    formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_BROKER_URL", f"redis://name:{ESCAPED}@{CLOSED}/0")
    try:
        raise ConnectionError(
            f"AUTH zQ7xK/vT@w3 refused by redis://name:{SECRET}@host, key {AWS['AWS_SECRET_ACCESS_KEY']}"
        )
    except ConnectionError:
        record = logging.LogRecord("kombu", 40, "f", 1, "lost %s", (f"amqp://a:{SECRET}@h",), sys.exc_info())
    line = formatter.format(record)
    assert told(line) == [] and "refused by redis://name:***@host" in line


@pytest.mark.usefixtures("secrets_around")
def test_what_a_row_keeps_of_an_error_has_no_secret(settings: Settings) -> None:
    with Client(settings) as client:
        view = client.submit("x")
        store = Store.open(settings.database_url)
        claim = store.claim(view.id, "w")
        assert claim is not None
        secret = AWS["AWS_SECRET_ACCESS_KEY"]
        store.fail(claim, f"no way: {secret}", retry=False, traceback=f"redis://:{SECRET}@h {secret}")
        failed = client.get(view.id)
        assert failed.error == "no way: ***" and told(str(failed.traceback)) == []
        store.close()


def test_a_producer_whose_broker_is_away_logs_no_secret(caplog: pytest.LogCaptureFixture, settings: Settings) -> None:
    for url in (f"redis://name:{ESCAPED}@{CLOSED}/0", f"rediss://:{SECRET}@{CLOSED}/0?ssl_cert_reqs=nonsense"):
        bell = Bell(url)
        with Client(settings) as client:
            view = client.submit("x")
        assert bell.ring([Due(view.id, "nightshift-mini", 0)]) == 0
        bell.close()
    assert len(caplog.records) == 2 and told(caplog.text) == []


def test_settings_show_no_secret_of_their_own() -> None:
    settings = Settings(broker_url=f"redis://:{SECRET}@h/0", database_url=f"postgresql://a:{SECRET}@h/d")
    assert told(repr(settings)) == told(str(settings)) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("redis://name:a/b#c@d@host:1/0", "redis://name:***@host:1/0"),
        ("postgresql://host/db?password=abcd&x=1", "postgresql://host/db?password=***&x=1"),
        ("see s3://bucket/key and file:///dir", "see s3://bucket/key and file:///dir"),
        ("12:30 me@host", "12:30 me@host"),
        ("X-Amz-Signature: no, ?X-Amz-Signature=abcdef", "X-Amz-Signature: no, ?X-Amz-Signature=***"),
    ],
)
def test_what_is_hidden_is_the_secret_alone(text: str, shown: str) -> None:
    assert hide(text) == shown_url(text) == shown


@pytest.mark.parametrize("url", ["redis://:a/b@host/0", "redis://:a@b@host/0", "redis://host/0?password=x"])
def test_a_password_that_would_be_taken_for_something_else_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(SettingsError, match=r"NIGHTSHIFT_BROKER_URL .*(write %40 for @|write it before the host)"):
        Settings(broker_url=url)


# --- rediss://


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """A TLS server with a certificate that nobody vouches for; what it is told once the handshake is over."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nightshift")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(1))
    builder = builder.not_valid_after(now + datetime.timedelta(1)).add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
    )
    certificate = builder.sign(key, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM) + key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_listen, args=(server, context, heard), daemon=True).start()
        yield server.getsockname()[1], heard


def _listen(server: socket.socket, context: ssl.SSLContext, heard: list[bytes]) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        connection.settimeout(5)
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                heard.append(secured.recv(4096))
        except OSError:  # the client broke the handshake off
            connection.close()


def test_a_redis_whose_certificate_nobody_vouches_for_is_told_no_password(stranger: tuple[int, list[bytes]]) -> None:
    port, heard = stranger
    url = f"rediss://:{SECRET}@127.0.0.1:{port}/0"
    checked = Settings(broker_url=url).broker_url
    with pytest.raises(BrokerUnavailable, match="certificate verify failed"):
        check_broker(checked)
    bell = Bell(checked)
    assert bell.ring([Due(uuid4(), "nightshift-mini", 0)]) == 0
    bell.close()
    assert not any(SECRET.encode() in data for data in heard)
    with pytest.raises(BrokerUnavailable):
        check_broker(Settings(broker_url=f"{url}?ssl_cert_reqs=none").broker_url)
    assert any(SECRET.encode() in data for data in heard), "the server would not have heard it in any case"


def test_a_redis_with_the_certificate_of_another_host_is_told_no_password(
    stranger: tuple[int, list[bytes]], tmp_path: Path
) -> None:
    port, heard = stranger
    trusted = f"ssl_cert_reqs=required&ssl_ca_certs={tmp_path / 'server.pem'}"
    with pytest.raises(BrokerUnavailable, match=r"certificate verify failed.*mismatch"):
        check_broker(Settings(broker_url=f"rediss://:{SECRET}@localhost:{port}/0?{trusted}").broker_url)
    assert not any(SECRET.encode() in data for data in heard)
    with pytest.raises(BrokerUnavailable):  # it is no Redis
        check_broker(Settings(broker_url=f"rediss://:{SECRET}@127.0.0.1:{port}/0?{trusted}").broker_url)
    assert any(SECRET.encode() in data for data in heard), "the right host would not have been told either"


# --- prompts

CANARY = "canary-7f3a"


def test_a_prompt_is_in_no_log_and_no_error(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with Client(settings) as client, fake_worker(settings, log, step_s=0.0, concurrency=4) as worker:
        good = client.submit(CANARY, negative_prompt=f"not {CANARY}", steps=2)
        broken = client.submit(f"{CANARY} broken row", steps=2)
        unknown = client.submit(CANARY, model="no-such-model")
        gone = client.submit(CANARY, init_image=_picture())
        Path(f"{settings.home}/storage/{gone.spec.input_key}").unlink(missing_ok=True)
        assert client.wait(good, PATIENCE_S).state is State.succeeded, tail(log)
        client.wait(gone, PATIENCE_S)
        client.cancel(unknown)
        shown = [client.get(view.id) for view in (good, broken, unknown, gone)]
        assert not [view.error for view in shown if CANARY in f"{view.error}{view.traceback}"]
        stop(worker, log)
    text = log.read_text()
    assert str(good.id) in text and CANARY not in text


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (96, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_refused_spec_quotes_its_bad_field_and_not_its_prompt() -> None:
    with pytest.raises(ValueError, match="steps") as caught:
        Client(Settings()).submit(CANARY, steps=0)
    assert CANARY not in str(caught.value)


def test_an_error_of_the_database_shows_no_prompt(settings: Settings) -> None:
    with Client(settings) as client, pytest.raises(Exception, match="no such table") as caught:
        store = client._store
        with store.engines.writer.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE job RENAME TO other")
        client.submit(CANARY)
    assert CANARY not in json.dumps([str(caught.value), repr(caught.value), str(caught.value.__cause__)])
