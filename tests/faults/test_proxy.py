"""The proxy's faults are what they claim to be: the fault suite believes it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import HOST, TcpProxy

SOON_S, LONG_S = 0.15, 10.0


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that answers each piece with the same bytes."""
    with socket.create_server((HOST, 0)) as door:
        door.settimeout(LONG_S)
        threading.Thread(target=_serve, args=(door,), daemon=True).start()
        yield door.getsockname()[1]


def _serve(door: socket.socket) -> None:
    while True:
        try:
            client, _ = door.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(client,), daemon=True).start()


def _echo(client: socket.socket) -> None:
    with client:
        try:
            while data := client.recv(65_536):
                client.sendall(data)
        except OSError:
            return


@pytest.fixture
def proxy(echo: int) -> Iterator[TcpProxy]:
    with TcpProxy(echo) as started:
        yield started


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((HOST, proxy.port), timeout=LONG_S)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    answer = b""
    while len(answer) < len(data) and (piece := client.recv(65_536)):
        answer += piece
    return answer


def test_bytes_pass_both_ways_and_ends_are_told(proxy: TcpProxy) -> None:
    data = bytes(range(256)) * 4096
    with connect(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        answer = b""
        while len(answer) < len(data):
            answer += client.recv(65_536)
        sender.join()
        assert answer == data
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert proxy.accepted == 1


def test_a_stall_accepts_and_never_answers_until_it_is_over(proxy: TcpProxy) -> None:
    with connect(proxy) as before:
        assert ask(before, b"one") == b"one"
        proxy.stall()
        with connect(proxy) as during:
            for client in (before, during):
                client.sendall(b"two")
                client.settimeout(SOON_S)
                with pytest.raises(TimeoutError):
                    client.recv(1)
                client.settimeout(LONG_S)
            proxy.pass_all()
            assert before.recv(3) == during.recv(3) == b"two"


def test_a_slow_way_delays_every_chunk(proxy: TcpProxy) -> None:
    proxy.slow(0.05, chunk_bytes=4)
    with connect(proxy) as client:
        began = time.monotonic()
        assert ask(client, b"x" * 16) == b"x" * 16
        assert time.monotonic() - began >= 4 * 0.05


def test_a_cut_resets_what_stands_and_serves_what_comes(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"one") == b"one"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with connect(proxy) as client:
        assert ask(client, b"two") == b"two"


def test_what_is_forgotten_stays_silent_while_new_connections_are_served(proxy: TcpProxy) -> None:
    with connect(proxy) as before:
        assert ask(before, b"one") == b"one"
        proxy.forget()
        before.sendall(b"two")
        before.settimeout(SOON_S)
        with pytest.raises(TimeoutError):
            before.recv(1)
        with connect(proxy) as after:
            assert ask(after, b"three") == b"three"


def test_a_truncated_reply_ends_in_its_middle(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"whole") == b"whole"
        proxy.truncate(3)
        client.sendall(b"broken")
        got = b""
        with pytest.raises(ConnectionResetError):
            while piece := client.recv(16):
                got += piece
        assert len(got) <= 3  # a reset may overtake what was on its way
    proxy.pass_all()
    with connect(proxy) as client:
        assert ask(client, b"whole again") == b"whole again"


def test_refused_means_that_nobody_listens_and_the_port_stays_ours(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        assert ask(client, b"one") == b"one"
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
    proxy.pass_all()
    with connect(proxy) as client:
        assert ask(client, b"two") == b"two"


def test_a_server_that_is_away_is_seen_through_the_proxy() -> None:
    with socket.create_server((HOST, 0)) as door:
        port = door.getsockname()[1]
    with TcpProxy(port) as proxy, connect(proxy) as client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_urls_lead_through_the_proxy_and_keep_everything_else(proxy: TcpProxy) -> None:
    url = "redis://:secret@127.0.0.1:6379/0?x=1"
    assert proxy.in_front(url) == f"redis://:secret@127.0.0.1:{proxy.port}/0?x=1"
    assert proxy.in_front("http://localhost:9000/b") == f"http://127.0.0.1:{proxy.port}/b"
